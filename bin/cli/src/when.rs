//! Times as people write them: a date, or how long ago.

use jiff::{SignedDuration, Timestamp};

/// RFC 3339 in UTC for `text`: that already, or a number and `s`, `m`, `h`, `d` or `w` for so long
/// before now.
///
/// # Errors
/// What is wrong with it and what would be right, for the operator.
pub fn parse(text: &str) -> Result<String, String> {
    if let Ok(time) = text.parse::<Timestamp>() {
        return Ok(time.to_string());
    }
    let ago = ago(text).and_then(|ago| Timestamp::now().checked_sub(ago).ok());
    ago.map(|time| time.to_string()).ok_or_else(|| {
        "write how long ago, like 30m, 2h or 7d, or a time with its zone, like \
         2026-11-23T10:00:00Z"
            .into()
    })
}

fn ago(text: &str) -> Option<SignedDuration> {
    let (number, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let seconds = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 24 * 3600,
        "w" => 7 * 24 * 3600,
        _ => return None,
    };
    let number: u32 = number.parse().ok()?;
    Some(SignedDuration::from_secs(i64::from(number) * seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_and_ages_are_times() {
        assert_eq!(parse("2026-11-23T10:00:00+01:00").unwrap(), "2026-11-23T09:00:00Z");
        let age = |text: &str| {
            let time: Timestamp = parse(text).unwrap().parse().unwrap();
            Timestamp::now().duration_since(time).as_secs()
        };
        assert!((7200..7260).contains(&age("2h")) && (1_209_600..1_209_660).contains(&age("2w")));
        for wrong in [
            "",
            "h",
            "2",
            "2x",
            "-2h",
            "yesterday",
            "2026-11-23",
            "2026-11-23 10:00",
            "9999999w",
            "2ü",
        ] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
