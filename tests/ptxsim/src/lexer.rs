//! Cuts a PTX text into tokens.
use crate::ast::{ParseError, Pos};
use std::fmt;

/// What a token is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Kind<'a> {
    /// An identifier with its `%`, `$` or `_`; also the sink `_`.
    Name(&'a str),
    /// A directive, type or modifier, without its dot. `::` inside it belongs to it.
    Dotted(&'a str),
    /// An integer literal.
    Int(u64),
    /// `0f…`
    F32(u32),
    /// `0d…`, or a decimal fraction.
    F64(u64),
    /// A string, without its quotes, escapes as written.
    Text(&'a str),
    /// Any other single character of the language.
    Punct(char),
    /// The end of the text.
    End,
}

impl fmt::Display for Kind<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Kind::Name(name) => write!(f, "`{name}`"),
            Kind::Dotted(name) => write!(f, "`.{name}`"),
            Kind::Int(value) => write!(f, "the number {value}"),
            Kind::F32(bits) => write!(f, "the number 0f{bits:08X}"),
            Kind::F64(bits) => write!(f, "the number {:?}", f64::from_bits(*bits)),
            Kind::Text(text) => write!(f, "the string \"{text}\""),
            Kind::Punct(punct) => write!(f, "`{punct}`"),
            Kind::End => f.write_str("the end of the file"),
        }
    }
}

/// A token and where it stands.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Token<'a> {
    pub kind: Kind<'a>,
    pub pos: Pos,
    /// Byte range in the text.
    pub start: usize,
    pub end: usize,
}

/// Hands out the tokens of a text one by one.
pub(crate) struct Lexer<'a> {
    source: &'a str,
    /// Bytes consumed so far, and the line and column reached.
    at: usize,
    pos: Pos,
}

fn is_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_' || c == '$'
}

impl<'a> Lexer<'a> {
    pub fn new(source: &'a str) -> Self {
        Lexer { source, at: 0, pos: Pos { line: 1, column: 1 } }
    }

    fn rest(&self) -> &'a str {
        &self.source[self.at..]
    }

    fn peek(&self) -> Option<char> {
        self.rest().chars().next()
    }

    /// Consumes `bytes`, which must end between characters.
    fn skip(&mut self, bytes: usize) -> &'a str {
        let text = &self.rest()[..bytes];
        for c in text.chars() {
            if c == '\n' {
                self.pos.line = self.pos.line.saturating_add(1);
                self.pos.column = 1;
            } else {
                self.pos.column = self.pos.column.saturating_add(1);
            }
        }
        self.at += bytes;
        text
    }

    /// Consumes characters while `keep` accepts them.
    fn skip_while(&mut self, keep: impl Fn(char) -> bool) -> &'a str {
        let rest = self.rest();
        self.skip(rest.find(|c| !keep(c)).unwrap_or(rest.len()))
    }

    fn skip_blanks(&mut self) -> Result<(), ParseError> {
        loop {
            self.skip_while(char::is_whitespace);
            if self.rest().starts_with("//") {
                self.skip_while(|c| c != '\n');
            } else if self.rest().starts_with("/*") {
                let Some(length) = self.rest()[2..].find("*/") else {
                    return Err(error(self.pos, "this comment has no end, expected `*/`"));
                };
                self.skip(length + 4);
            } else {
                return Ok(());
            }
        }
    }

    /// The next token; at the end of the text [`Kind::End`], again and again.
    pub fn next_token(&mut self) -> Result<Token<'a>, ParseError> {
        self.skip_blanks()?;
        let (pos, start) = (self.pos, self.at);
        let kind = match self.peek() {
            None => Kind::End,
            Some(c) if c.is_ascii_digit() => self.number(pos)?,
            Some(c) if is_word(c) || c == '%' => self.name(pos)?,
            Some('.') => self.dotted(pos)?,
            Some('"') => self.text(pos)?,
            Some(c) if "{}()[]<>,;:|!@+-~=".contains(c) => {
                self.skip(1);
                Kind::Punct(c)
            }
            Some(c) => return Err(error(pos, format!("unexpected character {c:?}"))),
        };
        Ok(Token { kind, pos, start, end: self.at })
    }

    fn name(&mut self, pos: Pos) -> Result<Kind<'a>, ParseError> {
        let start = self.at;
        self.skip(1); // of the first characters only `%` may not come again
        self.skip_while(is_word);
        match &self.source[start..self.at] {
            mark @ ("%" | "$") => {
                let found = self.peek().map_or("the end of the file".into(), |c| format!("{c:?}"));
                Err(error(pos, format!("expected a name after `{mark}`, found {found}")))
            }
            name => Ok(Kind::Name(name)),
        }
    }

    fn dotted(&mut self, pos: Pos) -> Result<Kind<'a>, ParseError> {
        self.skip(1);
        let start = self.at;
        self.skip_while(is_word);
        if start == self.at {
            let found = self.peek().map_or("the end of the file".into(), |c| format!("{c:?}"));
            return Err(error(pos, format!("expected a word after `.`, found {found}")));
        }
        while let Some(inner) = self.rest().strip_prefix("::")
            && inner.starts_with(is_word)
        {
            self.skip(2);
            self.skip_while(is_word);
        }
        Ok(Kind::Dotted(&self.source[start..self.at]))
    }

    fn text(&mut self, pos: Pos) -> Result<Kind<'a>, ParseError> {
        self.skip(1);
        let start = self.at;
        loop {
            self.skip_while(|c| !matches!(c, '"' | '\\' | '\n'));
            match self.peek() {
                Some('"') => break,
                // The escaped character, whatever it is, does not end the string.
                Some('\\') if self.rest().len() > 1 => {
                    self.skip(1);
                    self.skip(self.peek().map_or(0, char::len_utf8));
                }
                _ => return Err(error(pos, "this string has no end, expected `\"` in its line")),
            }
        }
        let text = &self.source[start..self.at];
        self.skip(1);
        Ok(Kind::Text(text))
    }

    fn number(&mut self, pos: Pos) -> Result<Kind<'a>, ParseError> {
        let start = self.at;
        let kind = match self.rest().as_bytes() {
            [b'0', b'x' | b'X', ..] => self.integer(2, 16, pos)?,
            [b'0', b'b' | b'B', ..] => self.integer(2, 2, pos)?,
            [b'0', b'f' | b'F', ..] => Kind::F32(self.float_bits(8, pos)? as u32),
            [b'0', b'd' | b'D', ..] => Kind::F64(self.float_bits(16, pos)?),
            [b'0', b'0'..=b'9', ..] => self.integer(1, 8, pos)?,
            _ => self.decimal(pos)?,
        };
        if self.peek().is_some_and(is_word) {
            self.skip_while(is_word);
            let found = &self.source[start..self.at];
            return Err(error(pos, format!("expected a number, found `{found}`")));
        }
        Ok(kind)
    }

    /// An integer of base `radix` whose digits follow `prefix` characters.
    fn integer(&mut self, prefix: usize, radix: u32, pos: Pos) -> Result<Kind<'a>, ParseError> {
        self.skip(prefix);
        let digits = self.skip_while(|c| c.is_digit(radix));
        if self.peek() == Some('U') {
            self.skip(1);
        }
        if digits.is_empty() {
            return Err(error(pos, format!("expected digits of base {radix}")));
        }
        u64::from_str_radix(digits, radix)
            .map(Kind::Int)
            .map_err(|_| error(pos, "this number does not fit in 64 bits"))
    }

    /// The bits of a float, written as exactly so many hexadecimal digits after `0f` or `0d`.
    fn float_bits(&mut self, expected: usize, pos: Pos) -> Result<u64, ParseError> {
        let prefix = self.skip(2);
        let digits = self.skip_while(|c| c.is_ascii_hexdigit());
        let bits = u64::from_str_radix(digits, 16).ok().filter(|_| digits.len() == expected);
        bits.ok_or_else(|| {
            let found = digits.len();
            let message =
                format!("expected {expected} hexadecimal digits after `{prefix}`, found {found}");
            error(pos, message)
        })
    }

    /// A decimal integer, or a fraction with an optional exponent.
    fn decimal(&mut self, pos: Pos) -> Result<Kind<'a>, ParseError> {
        let digits =
            |text: &str| text.len() - text.trim_start_matches(|c| char::is_ascii_digit(&c)).len();
        let rest = self.rest();
        let mut length = digits(rest);
        if let Some(fraction) = rest[length..].strip_prefix('.')
            && digits(fraction) > 0
        {
            length += 1 + digits(fraction);
        }
        if let Some(exponent) = rest[length..].strip_prefix(['e', 'E']) {
            let sign = usize::from(exponent.starts_with(['+', '-']));
            if digits(&exponent[sign..]) > 0 {
                length += 1 + sign + digits(&exponent[sign..]);
            }
        }
        if length == digits(rest) {
            return self.integer(0, 10, pos);
        }
        match self.skip(length).parse::<f64>() {
            Ok(value) if value.is_finite() => Ok(Kind::F64(value.to_bits())),
            _ => Err(error(pos, "this number does not fit in 64 bits")),
        }
    }
}

/// A parse error at `pos`.
pub(crate) fn error(pos: Pos, message: impl Into<String>) -> ParseError {
    ParseError { pos, message: message.into() }
}

/// The characters of a string whose escapes (`\"`, `\\`, `\n`, `\t`, three octal digits) are
/// resolved.
pub(crate) fn unescape(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let (byte, used) = match (first, tail) {
            (b'\\', [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', ..]) => {
                ((a - b'0') * 64 + (b - b'0') * 8 + (c - b'0'), 4)
            }
            (b'\\', [b'n', ..]) => (b'\n', 2),
            (b'\\', [b't', ..]) => (b'\t', 2),
            (b'\\', [other, ..]) => (*other, 2),
            _ => (*first, 1),
        };
        bytes.push(byte);
        rest = &rest[used..];
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
