//! A date that templates may print (`strftime_now`), without the system's calendar.

use super::{Budget, Res};

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// A moment in seconds since 1970, UTC.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Moment(pub(crate) i64);

impl Moment {
    /// Year, month (1 to 12) and day of the proleptic Gregorian calendar, after Howard Hinnant's
    /// `civil_from_days`.
    fn civil(self) -> (i64, usize, i64) {
        let days = self.0.div_euclid(86_400) + 719_468;
        let era = days.div_euclid(146_097);
        let day_of_era = days.rem_euclid(146_097);
        let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let shifted_month = (5 * day_of_year + 2) / 153;
        let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
        let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
        (year_of_era + era * 400 + i64::from(month <= 2), month as usize, day)
    }

    /// `strftime` in the C locale.
    pub(super) fn format(self, format: &str, budget: &Budget) -> Res<String> {
        let (year, month, day) = self.civil();
        let seconds = self.0.rem_euclid(86_400);
        let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
        let weekday = (self.0.div_euclid(86_400) + 4).rem_euclid(7) as usize;
        let leap = (year % 4 == 0 && year % 100 != 0) || year % 400 == 0;
        let before = [0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334][month - 1];
        let day_of_year = before + day + i64::from(leap && month > 2);
        let hour12 = (hour + 11) % 12 + 1;
        let mut out = String::new();
        let mut chars = format.chars();
        while let Some(c) = chars.next() {
            budget.alloc(32)?;
            if c != '%' {
                out.push(c);
                continue;
            }
            let mut code = chars.next().unwrap_or('%');
            // glibc's flag for numbers without padding.
            let bare = code == '-';
            if bare {
                code = chars.next().unwrap_or('-');
            }
            let number = |value: i64, width| {
                if bare { value.to_string() } else { format!("{value:0width$}") }
            };
            out.push_str(&match code {
                'Y' => year.to_string(),
                'y' => number(year.rem_euclid(100), 2),
                'm' => number(month as i64, 2),
                'd' => number(day, 2),
                'e' => format!("{day:2}"),
                'H' => number(hour, 2),
                'I' => number(hour12, 2),
                'M' => number(minute, 2),
                'S' => number(second, 2),
                'f' => "000000".to_owned(),
                'j' => number(day_of_year, 3),
                'p' => if hour < 12 { "AM" } else { "PM" }.to_owned(),
                'A' => DAYS[weekday].to_owned(),
                'a' => DAYS[weekday][..3].to_owned(),
                'B' => MONTHS[month - 1].to_owned(),
                'b' | 'h' => MONTHS[month - 1][..3].to_owned(),
                'w' => weekday.to_string(),
                'u' => (if weekday == 0 { 7 } else { weekday }).to_string(),
                'F' => format!("{year}-{month:02}-{day:02}"),
                'T' | 'X' => format!("{hour:02}:{minute:02}:{second:02}"),
                'D' | 'x' => format!("{month:02}/{day:02}/{:02}", year.rem_euclid(100)),
                'R' => format!("{hour:02}:{minute:02}"),
                // transformers passes a time without zone: both are empty.
                'z' | 'Z' => String::new(),
                's' => self.0.to_string(),
                'n' => "\n".to_owned(),
                't' => "\t".to_owned(),
                '%' => "%".to_owned(),
                other => format!("%{other}"),
            });
        }
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_follow_the_calendar() {
        let budget = Budget::new(10_000, 100_000);
        let text = |seconds, format| Moment(seconds).format(format, &budget).unwrap();
        assert_eq!(text(0, "%A %d %b %Y %H:%M:%S %j %p"), "Thursday 01 Jan 1970 00:00:00 001 AM");
        assert_eq!(text(1_709_210_096, "%F %T %-d %B %I %j"), "2024-02-29 12:34:56 29 February 12 060");
        assert_eq!(text(-86_400, "%d/%m/%y %a %%"), "31/12/69 Wed %");
        assert_eq!(text(0, "%Q %-m"), "%Q 1");
    }
}
