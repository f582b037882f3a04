//! One token of look-ahead over the text, and what every part of the grammar asks of it.
use crate::{
    ast::{ParseError, Pos},
    lexer::{Kind, Lexer, Token, error},
};

/// A numeric literal, or a sum of integers.
#[derive(Clone, Copy, Debug)]
pub(super) enum Number {
    Int(u64),
    F32(u32),
    F64(u64),
}

pub(super) struct Cursor<'a> {
    source: &'a str,
    lexer: Lexer<'a>,
    here: Token<'a>,
    /// Where the token before `here` ends, in bytes.
    last_end: usize,
}

impl<'a> Cursor<'a> {
    pub fn new(source: &'a str) -> Result<Self, ParseError> {
        let mut lexer = Lexer::new(source);
        let here = lexer.next_token()?;
        Ok(Cursor { source, lexer, here, last_end: 0 })
    }

    pub fn kind(&self) -> Kind<'a> {
        self.here.kind
    }

    pub fn pos(&self) -> Pos {
        self.here.pos
    }

    /// The current token as written.
    pub fn text(&self) -> &'a str {
        &self.source[self.here.start..self.here.end]
    }

    pub fn advance(&mut self) -> Result<(), ParseError> {
        self.last_end = self.here.end;
        self.here = self.lexer.next_token()?;
        Ok(())
    }

    /// The error of finding the current token instead of what is `expected`.
    pub fn expected(&self, expected: &str) -> ParseError {
        error(self.here.pos, format!("expected {expected}, found {}", self.here.kind))
    }

    pub fn at(&self, punct: char) -> bool {
        self.here.kind == Kind::Punct(punct)
    }

    pub fn eat(&mut self, punct: char) -> Result<bool, ParseError> {
        let found = self.at(punct);
        if found {
            self.advance()?;
        }
        Ok(found)
    }

    pub fn expect(&mut self, punct: char) -> Result<(), ParseError> {
        if self.eat(punct)? { Ok(()) } else { Err(self.expected(&format!("`{punct}`"))) }
    }

    /// Consumes `.word`, whatever the word.
    pub fn eat_any_dotted(&mut self) -> Result<Option<&'a str>, ParseError> {
        let Kind::Dotted(word) = self.here.kind else { return Ok(None) };
        self.advance()?;
        Ok(Some(word))
    }

    pub fn eat_dotted(&mut self, word: &str) -> Result<bool, ParseError> {
        let found = self.here.kind == Kind::Dotted(word);
        if found {
            self.advance()?;
        }
        Ok(found)
    }

    /// Consumes the name `word`.
    pub fn eat_word(&mut self, word: &str) -> Result<bool, ParseError> {
        let found = self.here.kind == Kind::Name(word);
        if found {
            self.advance()?;
        }
        Ok(found)
    }

    pub fn name(&mut self, expected: &str) -> Result<&'a str, ParseError> {
        let Kind::Name(name) = self.here.kind else { return Err(self.expected(expected)) };
        self.advance()?;
        Ok(name)
    }

    /// A name with the suffix of a special or vector register, if one is joined to it: `%tid.x`.
    pub fn name_with_suffix(&mut self, expected: &str) -> Result<String, ParseError> {
        let mut name = self.name(expected)?.to_owned();
        if let Kind::Dotted(suffix @ ("x" | "y" | "z" | "w" | "r" | "g" | "b" | "a")) = self.kind()
            && self.here.start == self.last_end
        {
            name.push('.');
            name.push_str(suffix);
            self.advance()?;
        }
        Ok(name)
    }

    pub fn string(&mut self, expected: &str) -> Result<&'a str, ParseError> {
        let Kind::Text(text) = self.here.kind else { return Err(self.expected(expected)) };
        self.advance()?;
        Ok(text)
    }

    /// A non-negative integer that fits in 32 bits; no sum, since `.loc 1 2 3` has no commas.
    pub fn small(&mut self, expected: &str) -> Result<u32, ParseError> {
        let Kind::Int(value) = self.here.kind else { return Err(self.expected(expected)) };
        let value = u32::try_from(value).map_err(|_| self.expected(expected))?;
        self.advance()?;
        Ok(value)
    }

    /// Whether a [`Cursor::number`] starts here.
    pub fn at_number(&self) -> bool {
        matches!(
            self.here.kind,
            Kind::Int(_) | Kind::F32(_) | Kind::F64(_) | Kind::Punct('+' | '-' | '~')
        )
    }

    /// A float with an optional sign, or a sum of integers.
    pub fn number(&mut self, expected: &str) -> Result<Number, ParseError> {
        let negative = self.at('-');
        if negative || self.at('+') {
            self.advance()?;
        }
        let number = match self.here.kind {
            Kind::F32(bits) => Number::F32(bits ^ u32::from(negative) << 31),
            Kind::F64(bits) => Number::F64(bits ^ u64::from(negative) << 63),
            _ => {
                let first = self.term(expected)?;
                let first = if negative { first.wrapping_neg() } else { first };
                return Ok(Number::Int(first.wrapping_add(self.terms(expected)?)));
            }
        };
        self.advance()?;
        Ok(number)
    }

    /// A sum of integers, as two's complement bits.
    pub fn integer(&mut self, expected: &str) -> Result<u64, ParseError> {
        let first = self.signed_term(expected)?;
        Ok(first.wrapping_add(self.terms(expected)?))
    }

    /// `+ a - b …`: what is added to a name or a number, 0 if nothing.
    pub fn terms(&mut self, expected: &str) -> Result<u64, ParseError> {
        let mut sum = 0u64;
        loop {
            if self.eat('+')? {
                sum = sum.wrapping_add(self.signed_term(expected)?);
            } else if self.eat('-')? {
                sum = sum.wrapping_sub(self.signed_term(expected)?);
            } else {
                return Ok(sum);
            }
        }
    }

    fn signed_term(&mut self, expected: &str) -> Result<u64, ParseError> {
        if self.eat('-')? {
            return Ok(self.term(expected)?.wrapping_neg());
        }
        self.eat('+')?;
        self.term(expected)
    }

    fn term(&mut self, expected: &str) -> Result<u64, ParseError> {
        let inverted = self.eat('~')?;
        let Kind::Int(value) = self.here.kind else { return Err(self.expected(expected)) };
        self.advance()?;
        Ok(if inverted { !value } else { value })
    }
}
