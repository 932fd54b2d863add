//! The store of patterns: one SQLite file, transactional, safe with several processes.

use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::{Connection, OptionalExtension, TransactionBehavior, params};

use crate::{Key, LensError, Pattern, PatternInfo};

const SCHEMA: &str = "
CREATE TABLE IF NOT EXISTS notes (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS patterns (
    fingerprint TEXT NOT NULL,
    name TEXT NOT NULL,
    info TEXT NOT NULL,
    key BLOB NOT NULL,
    pattern BLOB NOT NULL,
    PRIMARY KEY (fingerprint, name)
);";

/// The patterns of any number of models.
pub struct Library {
    path: PathBuf,
    db: Connection,
}

impl Library {
    /// Opens a library; a file that does not exist is made.
    ///
    /// # Errors
    /// A folder that cannot be made, a file that is no library, or a full disk.
    pub fn open(path: &Path) -> Result<Library, LensError> {
        if let Some(folder) = path.parent().filter(|f| !f.as_os_str().is_empty()) {
            std::fs::create_dir_all(folder).map_err(|source| LensError::Io { path: folder.into(), source })?;
        }
        let open = || -> rusqlite::Result<Connection> {
            let db = Connection::open(path)?;
            db.busy_timeout(Duration::from_secs(20))?;
            // Not WAL: that needs files beside it even to read, and a file system on which processes share memory.
            db.pragma_update(None, "journal_mode", "DELETE")?;
            db.execute_batch(SCHEMA)?;
            Ok(db)
        };
        let db = open().map_err(|source| LensError::Database { path: path.into(), source })?;
        Ok(Library { path: path.into(), db })
    }

    /// The database file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn db_error(&self, source: rusqlite::Error) -> LensError {
        LensError::Database { path: self.path.clone(), source }
    }

    /// Stores patterns, all or none; one of the same model and name is replaced.
    ///
    /// # Errors
    /// The database.
    pub fn put(&mut self, patterns: &[Pattern]) -> Result<(), LensError> {
        let mut rows = Vec::with_capacity(patterns.len());
        for p in patterns {
            let info = serde_json::to_string(&p.info).map_err(|e| LensError::invalid("pattern", e.to_string()))?;
            rows.push((&p.info, info, p.key.to_bytes(), p.to_bytes()?));
        }
        let write = |db: &mut Connection| -> rusqlite::Result<()> {
            let transaction = db.transaction_with_behavior(TransactionBehavior::Immediate)?;
            for (info, text, key, pattern) in &rows {
                transaction.execute(
                    "INSERT OR REPLACE INTO patterns (fingerprint, name, info, key, pattern) VALUES (?1, ?2, ?3, ?4, ?5)",
                    params![info.fingerprint, info.name, text, key, pattern],
                )?;
            }
            transaction.commit()
        };
        write(&mut self.db).map_err(|source| LensError::Database { path: self.path.clone(), source })
    }

    /// The pattern of a task.
    ///
    /// # Errors
    /// No such pattern (the nearest name is suggested), a damaged one, or the database.
    pub fn get(&self, fingerprint: &str, name: &str) -> Result<Pattern, LensError> {
        let sql = "SELECT pattern FROM patterns WHERE fingerprint = ?1 AND name = ?2";
        let row = self.db.query_row(sql, params![fingerprint, name], |r| r.get::<_, Vec<u8>>(0)).optional();
        match row.map_err(|e| self.db_error(e))? {
            Some(bytes) => Pattern::from_bytes(&bytes, &format!("pattern `{name}`")),
            None => {
                let infos = self.list(None)?;
                let (ours, others): (Vec<_>, Vec<_>) = infos.into_iter().partition(|i| i.fingerprint == fingerprint);
                if let Some(other) = others.into_iter().find(|i| i.name == name) {
                    let (what, ours) = (format!("pattern `{name}`"), fingerprint.to_string());
                    return Err(LensError::OtherModel { what, theirs: other.fingerprint, ours });
                }
                if ours.is_empty() {
                    let problem = format!(
                        "{} has no patterns of model {fingerprint}; help: make them with `quorate profile --tasks DIR`",
                        self.path.display()
                    );
                    return Err(LensError::invalid("pattern library", problem));
                }
                Err(LensError::unknown("task", name, ours.iter().map(|i| i.name.as_str())))
            }
        }
    }

    /// Provenance of all patterns (of a model), by name.
    ///
    /// # Errors
    /// The database.
    pub fn list(&self, fingerprint: Option<&str>) -> Result<Vec<PatternInfo>, LensError> {
        let read = || -> rusqlite::Result<Vec<String>> {
            let sql = "SELECT info FROM patterns WHERE ?1 IS NULL OR fingerprint = ?1 ORDER BY fingerprint, name";
            self.db.prepare(sql)?.query_map(params![fingerprint], |r| r.get(0))?.collect()
        };
        let texts = read().map_err(|e| self.db_error(e))?;
        let parse =
            |t: &String| serde_json::from_str(t).map_err(|e| LensError::invalid("pattern library", e.to_string()));
        texts.iter().map(parse).collect()
    }

    /// Names and retrieval keys of a model's patterns; generalists are not among them.
    ///
    /// # Errors
    /// The database, or a damaged key.
    pub fn keys(&self, fingerprint: &str) -> Result<Vec<(String, Key)>, LensError> {
        let read = || -> rusqlite::Result<Vec<(String, Vec<u8>)>> {
            let sql = "SELECT name, key FROM patterns WHERE fingerprint = ?1 ORDER BY name";
            self.db.prepare(sql)?.query_map([fingerprint], |r| Ok((r.get(0)?, r.get(1)?)))?.collect()
        };
        let mut keys = Vec::new();
        for (name, bytes) in read().map_err(|e| self.db_error(e))? {
            let key = Key::from_bytes(&bytes).map_err(|e| LensError::invalid(format!("pattern `{name}`"), e))?;
            if !key.prototypes.is_empty() {
                keys.push((name, key));
            }
        }
        Ok(keys)
    }

    /// Removes a pattern.
    ///
    /// # Errors
    /// No such pattern, or the database.
    pub fn remove(&mut self, fingerprint: &str, name: &str) -> Result<(), LensError> {
        let sql = "DELETE FROM patterns WHERE fingerprint = ?1 AND name = ?2";
        let removed = self.db.execute(sql, params![fingerprint, name]).map_err(|e| self.db_error(e))?;
        if removed == 0 {
            let infos = self.list(Some(fingerprint))?;
            return Err(LensError::unknown("task", name, infos.iter().map(|i| i.name.as_str())));
        }
        Ok(())
    }

    /// Stores patterns from files that `export` wrote; all or none. Returns their names.
    ///
    /// # Errors
    /// A file that cannot be read or is no pattern.
    pub fn import(&mut self, files: &[PathBuf]) -> Result<Vec<String>, LensError> {
        let mut patterns = Vec::with_capacity(files.len());
        for path in files {
            let bytes = std::fs::read(path).map_err(|source| LensError::Io { path: path.clone(), source })?;
            patterns.push(Pattern::from_bytes(&bytes, &path.display().to_string())?);
        }
        self.put(&patterns)?;
        Ok(patterns.into_iter().map(|p| p.info.name).collect())
    }

    /// A note kept in the library.
    ///
    /// # Errors
    /// The database.
    pub fn note(&self, name: &str) -> Result<Option<String>, LensError> {
        let row = self.db.query_row("SELECT value FROM notes WHERE name = ?1", [name], |r| r.get(0)).optional();
        row.map_err(|e| self.db_error(e))
    }

    /// Keeps a note.
    ///
    /// # Errors
    /// The database.
    pub fn set_note(&mut self, name: &str, value: &str) -> Result<(), LensError> {
        let sql = "INSERT OR REPLACE INTO notes (name, value) VALUES (?1, ?2)";
        self.db.execute(sql, [name, value]).map_err(|e| self.db_error(e))?;
        Ok(())
    }
}
