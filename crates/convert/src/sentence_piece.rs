//! The pieces of a SentencePiece model file (protocol buffers): field 1 of the message, once for each piece, which has its text
//! (1), score (2) and type (3).

/// A piece.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Piece {
    pub text: String,
    pub score: f32,
    /// 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 a byte: the same numbers as in GGUF.
    pub kind: i64,
}

/// Reads all pieces.
pub(crate) fn pieces(bytes: &[u8]) -> Result<Vec<Piece>, String> {
    let mut pieces = Vec::new();
    let mut message = Message { bytes };
    while let Some((field, value)) = message.next()? {
        if let (1, Field::Bytes(bytes)) = (field, value) {
            pieces.push(piece(bytes)?);
        }
    }
    if pieces.is_empty() { Err("it has no pieces".to_owned()) } else { Ok(pieces) }
}

fn piece(bytes: &[u8]) -> Result<Piece, String> {
    let mut piece = Piece { text: String::new(), score: 0.0, kind: 1 };
    let mut message = Message { bytes };
    while let Some((field, value)) = message.next()? {
        match (field, value) {
            (1, Field::Bytes(text)) => {
                piece.text = String::from_utf8(text.to_vec()).map_err(|_| "a piece is not UTF-8".to_owned())?;
            }
            (2, Field::Four(bits)) => piece.score = f32::from_le_bytes(bits),
            (3, Field::Number(kind)) => {
                let known = i64::try_from(kind).ok().filter(|kind| (1..=6).contains(kind));
                piece.kind = known.ok_or_else(|| format!("a piece has the type {kind}, which is unknown"))?;
            }
            _ => {}
        }
    }
    match piece.score.is_finite() {
        true => Ok(piece),
        false => Err(format!("the piece {:?} has no number as score", piece.text)),
    }
}

enum Field<'a> {
    Number(u64),
    Four([u8; 4]),
    Bytes(&'a [u8]),
    Skipped,
}

struct Message<'a> {
    bytes: &'a [u8],
}

impl<'a> Message<'a> {
    /// The next field's number and value, `None` at the end.
    fn next(&mut self) -> Result<Option<(u64, Field<'a>)>, String> {
        if self.bytes.is_empty() {
            return Ok(None);
        }
        let tag = self.varint()?;
        let value = match tag & 7 {
            0 => Field::Number(self.varint()?),
            1 => {
                self.take(8)?;
                Field::Skipped
            }
            2 => {
                let len = self.varint()?;
                Field::Bytes(self.take(len)?)
            }
            5 => {
                let mut four = [0; 4];
                four.copy_from_slice(self.take(4)?);
                Field::Four(four)
            }
            other => return Err(format!("a field has the wire type {other}, which is unknown")),
        };
        Ok(Some((tag >> 3, value)))
    }

    fn take(&mut self, len: u64) -> Result<&'a [u8], String> {
        let cut = usize::try_from(len).ok().and_then(|len| self.bytes.split_at_checked(len));
        let (taken, rest) = cut.ok_or("it is cut off")?;
        self.bytes = rest;
        Ok(taken)
    }

    fn varint(&mut self) -> Result<u64, String> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.take(1)?[0];
            value |= u64::from(byte & 127) << shift;
            if byte < 128 {
                return Ok(value);
            }
        }
        Err("a number has more than 64 bits".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_by_hand() {
        // "ab" with score -1.5 and type 4; a field 2 (trainer) that is skipped; "c" with the defaults.
        let mut bytes = vec![0x0a, 11, 0x0a, 2, b'a', b'b', 0x15, 0, 0, 0xc0, 0xbf, 0x18, 4];
        bytes.extend([0x12, 2, 0x08, 1]);
        bytes.extend([0x0a, 3, 0x0a, 1, b'c']);
        let expected = [("ab", -1.5, 4), ("c", 0.0, 1)];
        let expected = expected.map(|(text, score, kind)| Piece { text: text.to_owned(), score, kind });
        assert_eq!(pieces(&bytes).unwrap(), expected);
        for cut in 1..bytes.len() {
            // A cut between fields of the message is a shorter message.
            let whole = [13, 17].contains(&cut);
            assert_eq!(pieces(&bytes[..cut]).is_ok(), whole, "{cut}");
        }
        assert!(pieces(&[]).is_err());
    }
}
