//! Prices as people write them: `12.00-15.00`, `￥1,299.00`, `1.299,00 €`, `12元起`. Pure.
//!
//! A number is taken only where there is no doubt which one is meant; else the words are all that is known. Nothing passes
//! through floating point.

use rust_decimal::Decimal;

/// The longest text that is read as a price, and kept of one, in bytes.
const LENGTH_MAX: usize = 200;

/// More digits than any price has.
const DIGITS_MAX: usize = 28;

/// A price that is a number, or a range of two.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Price {
    /// The number; of a range the low end.
    pub low: Decimal,
    /// The same with the digits as they were written: `1299.00`.
    pub text: String,
    /// The high end of a range.
    pub high: Option<Decimal>,
}

impl Price {
    /// What it means, without its form: equal for equal prices.
    #[must_use]
    pub fn meaning(&self) -> String {
        let low = self.low.normalize();
        self.high.map_or_else(|| low.to_string(), |high| format!("{low}-{}", high.normalize()))
    }
}

/// A price for a record: a plain number, and the words that it was read from if they say more, or are no number.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stated {
    /// Digits and a point.
    pub number: Option<String>,
    /// As the vendor wrote it, if that is not the number itself.
    pub words: Option<String>,
}

/// What a text says of a price.
#[must_use]
pub fn stated(text: &str) -> Stated {
    let text = text.trim();
    if !text.chars().any(char::is_alphanumeric)
        || text.eq_ignore_ascii_case("null")
        || text.eq_ignore_ascii_case("none")
    {
        return Stated::default();
    }
    let number = read(text).map(|price| price.text);
    let is_plain = number.as_deref() == Some(text) || plain(text).is_some_and(|value| value >= Decimal::ZERO);
    let words = (!is_plain).then(|| super::codec::shorten(text, LENGTH_MAX).into_owned());
    Stated { number, words }
}

/// What is compared of a price to see whether it has changed: the meaning of the words, else of the number, else the
/// words. A number below zero is none.
#[must_use]
pub fn meaning(number: Option<&str>, words: Option<&str>) -> String {
    let text = words.or(number).unwrap_or_default().trim();
    match read(text) {
        Some(price) => price.meaning(),
        None if plain(text).is_some() => String::new(),
        None => text.to_owned(),
    }
}

/// A price as it is shown of a change: the number if it is all of the meaning, else the words.
#[must_use]
pub fn shown<'p>(number: Option<&'p str>, words: Option<&'p str>) -> Option<&'p str> {
    let is_one = |words: &str| read(words).is_none_or(|price| price.high.is_none());
    match (number, words) {
        (Some(number), Some(words)) if is_one(words) => Some(number),
        (_, Some(words)) => Some(words),
        (number, None) => number,
    }
    .filter(|text| plain(text).is_none_or(|value| value >= Decimal::ZERO))
}

/// Reads a price; nothing if the text is none, is below zero, or can be read in two ways.
#[must_use]
pub fn read(text: &str) -> Option<Price> {
    let text = text.trim();
    if text.is_empty() || text.len() > LENGTH_MAX {
        return None;
    }
    if let Some(value) = plain(text) {
        let written = if text.contains(['e', 'E']) { value.normalize().to_string() } else { text.to_owned() };
        return (value >= Decimal::ZERO).then_some(Price { low: value, text: written, high: None });
    }
    let pieces = pieces(text)?;
    let words =
        || pieces.iter().filter_map(|piece| if let Piece::Word(word) = piece { Some(word.as_str()) } else { None });
    if !words().all(|word| WORDS.contains(&word) || is_currency(word)) {
        return None;
    }
    let is_dotted = words().all(|word| !is_currency(word) || DOTTED.contains(&word));
    let (mut numbers, mut is_range, mut scale) = (Vec::new(), false, [1_u32; 2]);
    for piece in &pieces {
        match piece {
            Piece::Number(number) if numbers.is_empty() || (is_range && numbers.len() == 1) => {
                numbers.push(digits(number, is_dotted)?);
            }
            // Two numbers without a word for a range, or three: nobody knows which is the price.
            Piece::Number(_) => return None,
            // A dash before the first number makes it one below zero; a second one makes it a date.
            Piece::Dash if numbers.is_empty() || is_range => return None,
            Piece::Dash => is_range = true,
            Piece::Word(word) if TEN_THOUSAND.contains(&word.as_str()) => {
                *scale.get_mut(numbers.len().checked_sub(1)?)? = 10_000;
            }
            Piece::Word(_) => {}
        }
    }
    match &numbers[..] {
        [one] if !is_range => scaled(one, scale[0]).map(|(low, text)| Price { low, text, high: None }),
        [low, high] => {
            // 12-15万: the unit stands once, and is of both.
            let of_low =
                if scale[0] == 1 && low.parse::<Decimal>().ok()? < high.parse().ok()? { scale[1] } else { scale[0] };
            let ((low, text), (high, _)) = (scaled(low, of_low)?, scaled(high, scale[1])?);
            // From more to less is no range, but a discount, a date or a telephone.
            (low <= high).then_some(Price { low, text, high: (low < high).then_some(high) })
        }
        _ => None,
    }
}

/// A number as computers write it.
fn plain(text: &str) -> Option<Decimal> {
    let is_plain = |byte: u8| byte.is_ascii_digit() || b".-".contains(&byte);
    if text.bytes().all(is_plain) {
        text.parse().ok()
    } else if text.starts_with(|c: char| c.is_ascii_digit() || c == '-') && text.contains(['e', 'E']) {
        // Java writes 10,000,000 as 1.0E7, which columns of decimals do not take.
        Decimal::from_scientific(text).ok()
    } else {
        None
    }
}

/// Words that may stand beside a price and leave its number what it is, in lower case.
const WORDS: [&str; 44] = [
    "元",
    "块",
    "块钱",
    "人民币",
    "起",
    "从",
    "约",
    "价格",
    "价",
    "售价",
    "现价",
    "仅",
    "仅售",
    "特价",
    "每",
    "件",
    "个",
    "只",
    "套",
    "台",
    "张",
    "条",
    "双",
    "盒",
    "包",
    "瓶",
    "斤",
    "公斤",
    "千克",
    "米",
    "from",
    "only",
    "price",
    "about",
    "ca",
    "ab",
    "each",
    "ea",
    "pc",
    "pcs",
    "piece",
    "kg",
    "万",
    "萬",
];

/// Words that multiply.
const TEN_THOUSAND: [&str; 2] = ["万", "萬"];

/// Currencies whose decimals follow a point. Of others `1.299` and `1,299` can be either.
const DOTTED: [&str; 24] = [
    "¥",
    "￥",
    "元",
    "cny",
    "rmb",
    "cn",
    "$",
    "us$",
    "usd",
    "us",
    "hk$",
    "hkd",
    "nt$",
    "twd",
    "s$",
    "sgd",
    "£",
    "gbp",
    "円",
    "jpy",
    "₩",
    "원",
    "krw",
    "人民币",
];

/// Currencies that are written as words or abbreviations.
const CURRENCIES: [&str; 40] = [
    "cny", "rmb", "cn", "usd", "us", "hkd", "twd", "sgd", "gbp", "jpy", "krw", "eur", "aud", "cad", "chf", "sek",
    "nok", "dkk", "pln", "czk", "huf", "ron", "try", "rub", "inr", "idr", "thb", "vnd", "myr", "php", "brl", "mxn",
    "zar", "aed", "kr", "zł", "kč", "ft", "rp", "rs",
];

fn is_currency(word: &str) -> bool {
    let is_sign = |c: char| "$£¥¢€₹₽₩₫₪₦₱₺₴฿￥＄￡￦₿₸₼₾₵₲₡₮".contains(c);
    ["元", "圆", "圓", "円", "원", "人民币", "руб", "р", "r", "a", "c", "nt", "hk", "s"].contains(&word)
        || CURRENCIES.contains(&word)
        || word.chars().any(is_sign) && word.chars().all(|c| is_sign(c) || c.is_ascii_alphabetic())
}

#[derive(Debug, PartialEq, Eq)]
enum Piece {
    Number(String),
    Word(String),
    Dash,
}

/// The text in its numbers, words and dashes; nothing if there is anything else in it.
fn pieces(text: &str) -> Option<Vec<Piece>> {
    // Full-width forms are those of ASCII, 0xFEE0 further on.
    let narrow = |c: char| match c {
        '\u{ff01}'..='\u{ff5e}' => char::from_u32(u32::from(c) - 0xfee0).unwrap_or(c),
        '\u{a0}' | '\u{2009}' | '\u{202f}' | '\u{3000}' => ' ',
        '’' => '\'',
        c => c,
    };
    let chars: Vec<char> = text.chars().map(narrow).flat_map(char::to_lowercase).collect();
    let is_digit = |at: usize| chars.get(at).is_some_and(char::is_ascii_digit);
    let mut pieces = Vec::new();
    let mut at = 0;
    while let Some(&c) = chars.get(at) {
        let start = at;
        at += 1;
        match c {
            '0'..='9' => {
                // A separator belongs to the number if a digit follows; a space only if three do, and no more.
                while let Some(&next) = chars.get(at) {
                    let groups = || (1..=3).all(|ahead| is_digit(at + ahead)) && !is_digit(at + 4);
                    let goes_on = match next {
                        '0'..='9' => true,
                        '.' | ',' => is_digit(at + 1),
                        ' ' | '\'' => groups(),
                        _ => false,
                    };
                    if !goes_on {
                        break;
                    }
                    at += 1;
                }
                pieces.push(Piece::Number(chars[start..at].iter().collect()));
            }
            '-' | '–' | '—' | '−' | '‐' | '~' | '〜' | '∼' | '至' | '到' => pieces.push(Piece::Dash),
            ' ' | ':' | '/' => {}
            // "kr." and the like.
            '.' if matches!(pieces.last(), Some(Piece::Word(_))) => {}
            // ",-" behind a whole number.
            ',' if chars.get(at) == Some(&'-') && at + 1 == chars.len() => at += 1,
            c if c.is_alphabetic() || is_currency(&c.to_string()) => {
                let same = |c: char| c.is_alphabetic() && !"至到".contains(c) || is_currency(&c.to_string());
                while chars.get(at).is_some_and(|c| same(*c)) {
                    at += 1;
                }
                let word: String = chars[start..at].iter().collect();
                match word.as_str() {
                    "to" | "bis" => pieces.push(Piece::Dash),
                    _ => pieces.extend(known(&word).into_iter().map(|word| Piece::Word(word.to_owned()))),
                }
            }
            _ => return None,
        }
    }
    Some(pieces)
}

/// A run of letters as the words in it that are known: 元起 is two.
fn known(run: &str) -> Vec<&str> {
    let is_known = |word: &str| WORDS.contains(&word) || is_currency(word);
    if is_known(run) {
        return vec![run];
    }
    // The longest first.
    let mut cuts = run.char_indices().rev().map(|(at, _)| at).filter(|at| *at > 0);
    cuts.find(|&at| is_known(&run[..at])).map_or_else(|| vec![run], |at| [vec![&run[..at]], known(&run[at..])].concat())
}

/// A written number as digits and a point; nothing if its separators can be read in two ways, or in none.
fn digits(number: &str, is_dotted: bool) -> Option<String> {
    let separators: Vec<char> = number.chars().filter(|c| !c.is_ascii_digit()).collect();
    let groups: Vec<&str> = number.split(|c: char| !c.is_ascii_digit()).collect();
    let (first, last) = (*groups.first()?, *groups.last()?);
    let Some((&separator, earlier)) = separators.split_last() else { return of_digits(number, "") };
    // 1,29,900: in India only the last group has three.
    let in_groups = |groups: &[&str]| {
        let (head, middle) = groups.split_first().unwrap_or((&"", &[]));
        let Some((tail, middle)) = middle.split_last() else { return true };
        let by = |length: usize| middle.iter().all(|group| group.len() == length);
        (1..=3).contains(&head.len()) && tail.len() == 3 && (by(3) || by(2)) && !head.starts_with('0')
    };
    let whole = || groups[..groups.len() - 1].concat();
    if earlier.contains(&separator) {
        // One kind, several times: thousands.
        return (earlier.iter().all(|c| *c == separator) && in_groups(&groups))
            .then(|| of_digits(&groups.concat(), ""))?;
    }
    if let Some(&thousands) = earlier.first() {
        // Two kinds: the last one is the decimals'.
        let is_right = earlier.iter().all(|c| *c == thousands) && ".,".contains(separator);
        return (is_right && in_groups(&groups[..groups.len() - 1])).then(|| of_digits(&whole(), last))?;
    }
    let could_be_thousands = last.len() == 3 && (1..=3).contains(&first.len()) && !first.starts_with('0');
    match separator {
        ' ' | '\'' => could_be_thousands.then(|| of_digits(&groups.concat(), ""))?,
        _ if could_be_thousands && !is_dotted => None,
        ',' if could_be_thousands => of_digits(&groups.concat(), ""),
        _ => of_digits(first, last),
    }
}

fn of_digits(whole: &str, decimals: &str) -> Option<String> {
    if whole.len() + decimals.len() > DIGITS_MAX {
        return None;
    }
    Some(if decimals.is_empty() { whole.to_owned() } else { format!("{whole}.{decimals}") })
}

fn scaled(digits: &str, by: u32) -> Option<(Decimal, String)> {
    let value: Decimal = digits.parse().ok()?;
    if by == 1 {
        return Some((value, digits.to_owned()));
    }
    let value = value.checked_mul(by.into())?.normalize();
    Some((value, value.to_string()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_price_is_its_number_or_the_low_end_of_its_range() {
        let table = [
            ("12.00", Some(("12.00", None))),
            ("0", Some(("0", None))),
            ("1.0E7", Some(("10000000", None))),
            ("12.00-15.00", Some(("12.00", Some("15")))),
            ("¥12.00 - ¥15.00", Some(("12.00", Some("15")))),
            ("12~15元", Some(("12", Some("15")))),
            ("12.5至15元", Some(("12.5", Some("15")))),
            ("US $1.20 – 3.40 / piece", Some(("1.20", Some("3.4")))),
            ("12.00-12.00", Some(("12.00", None))),
            ("￥1,299.00", Some(("1299.00", None))),
            ("１２．５０元", Some(("12.50", None))),
            ("CNY 1,299", Some(("1299", None))),
            ("1.299,00 €", Some(("1299.00", None))),
            ("12,50 €", Some(("12.50", None))),
            ("1 299,00 kr.", Some(("1299.00", None))),
            ("CHF 1'299.50", Some(("1299.50", None))),
            ("₹1,29,900", Some(("129900", None))),
            ("1.299.000₫", Some(("1299000", None))),
            ("¥0.125", Some(("0.125", None))),
            ("€0,125", Some(("0.125", None))),
            ("12元起", Some(("12", None))),
            ("from $9.99", Some(("9.99", None))),
            ("12.00元/件", Some(("12.00", None))),
            ("1.2万", Some(("12000", None))),
            ("12-15万", Some(("120000", Some("150000")))),
            ("HK$88", Some(("88", None))),
            ("R$ 12,90", Some(("12.90", None))),
            ("12.00 EUR", Some(("12.00", None))),
            // Either a thousand or one and some: nobody knows.
            ("1.299 €", None),
            ("1,299 €", None),
            ("Rp 12.500", None),
            // Below zero, or no price.
            ("-1", None),
            ("-¥5", None),
            ("¥-5", None),
            ("满100-50", None),
            ("100-50", None),
            ("2024-01-02", None),
            ("2件 ¥10", None),
            ("¥12/2件", None),
            ("12,00,5", None),
            ("1,2345", Some(("1.2345", None))),
            ("(12.00)", None),
            ("12.00-", None),
            ("10%", None),
            ("面议", None),
            ("call us", None),
            ("10 off", None),
            ("", None),
            ("¥", None),
            ("NaN", None),
            ("1e400", None),
        ];
        for (text, expected) in table {
            let found = read(text);
            let high = found.as_ref().and_then(|price| price.high).map(|high| high.normalize().to_string());
            let found = found.as_ref().map(|price| (price.text.as_str(), high.as_deref()));
            assert_eq!(found, expected, "{text}");
        }
    }

    #[test]
    fn words_are_kept_where_they_are_not_the_number_itself() {
        let stated = |text| {
            let Stated { number, words } = stated(text);
            (number.unwrap_or_default(), words.unwrap_or_default())
        };
        let pair = |number: &str, words: &str| (number.to_owned(), words.to_owned());
        assert_eq!(stated("12.00"), pair("12.00", ""));
        assert_eq!(stated("1.0E7"), pair("10000000", ""));
        assert_eq!(stated(" 12.00-15.00 "), pair("12.00", "12.00-15.00"));
        assert_eq!(stated("￥1,299.00"), pair("1299.00", "￥1,299.00"));
        assert_eq!(stated("面议"), pair("", "面议"));
        assert_eq!(stated("-1"), pair("", "-1"));
        for nothing in ["", " ", "-", "--", "null", "¥"] {
            assert_eq!(stated(nothing), pair("", ""), "{nothing:?}");
        }
    }

    #[test]
    fn a_change_shows_the_number_unless_the_words_say_more() {
        assert_eq!(shown(Some("1299.00"), Some("￥1,299.00")), Some("1299.00"));
        assert_eq!(shown(Some("12.00"), Some("12.00-15.00")), Some("12.00-15.00"));
        assert_eq!(shown(Some("12.00"), None), Some("12.00"));
        assert_eq!(shown(None, Some("面议")), Some("面议"));
        assert_eq!(shown(None, Some("-1")), None);
        assert_eq!(shown(Some("-1"), None), None, "as earlier versions of weir wrote it");
    }

    proptest! {
        #[test]
        fn what_is_read_is_never_below_zero_and_means_the_same_as_its_own_text(text in "[-~0-9.,元¥€ 万a-c至]{0,12}|\\PC{0,20}") {
            if let Some(price) = read(&text) {
                prop_assert!(price.low >= Decimal::ZERO);
                prop_assert!(price.high.is_none_or(|high| high > price.low));
                let plain = read(&price.text).unwrap();
                prop_assert_eq!((plain.low, plain.high), (price.low, None));
                prop_assert_eq!(meaning(None, Some(&price.meaning())), price.meaning());
            }
            let stated = stated(&text);
            let number = read(stated.number.as_deref().unwrap_or_default());
            prop_assert_eq!(number.is_some(), stated.number.is_some());
        }

        #[test]
        fn however_a_number_is_written_it_is_that_number(whole in 1_000..9_999_999_u32, cents in 0..100_u32) {
            let groups = |separator: &str| {
                let digits = whole.to_string();
                let parts: Vec<&str> = digits.as_bytes().rchunks(3).rev().map(|part| std::str::from_utf8(part).unwrap()).collect();
                parts.join(separator)
            };
            let expected = format!("{whole}.{cents:02}");
            for text in [
                format!("¥{}.{cents:02}", groups(",")), format!("{},{cents:02} €", groups(".")),
                format!("{},{cents:02} kr", groups("\u{a0}")), format!("CHF {}.{cents:02}", groups("'")), expected.clone(),
            ] {
                prop_assert_eq!(read(&text).map(|price| price.text), Some(expected.clone()), "{}", text);
            }
        }
    }
}
