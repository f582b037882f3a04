//! Statements: labels, instructions, operands.
use super::cursor::{Cursor, Number};
use crate::ast::{Base, Guard, Instr, Item, Operand, ParseError};

/// A label, or an instruction with its guard and its `;`.
pub(super) fn statement(cursor: &mut Cursor<'_>) -> Result<Item, ParseError> {
    let guard = if cursor.eat('@')? {
        let negated = cursor.eat('!')?;
        let predicate = cursor.name("a predicate register")?.to_owned();
        Some(Guard { predicate, negated })
    } else {
        None
    };
    let pos = cursor.pos();
    if cursor.text().starts_with('%') || cursor.text() == "_" {
        return Err(cursor.expected("an instruction"));
    }
    let expected = if guard.is_some() { "an instruction" } else { "an instruction or `}`" };
    let root = cursor.name(expected)?.to_owned();
    if guard.is_none() && cursor.eat(':')? {
        return Ok(Item::Label { name: root, pos });
    }
    let mut mods = Vec::new();
    while let Some(modifier) = cursor.eat_any_dotted()? {
        mods.push(modifier.to_owned());
    }
    let mut operands = Vec::new();
    if !cursor.at(';') {
        operands.push(operand(cursor)?);
        while cursor.eat(',')? {
            operands.push(operand(cursor)?);
        }
    }
    if !cursor.eat(';')? {
        return Err(cursor.expected(&format!("`,` or `;` after an operand of `{root}`")));
    }
    Ok(Item::Instr(Instr { guard, root, mods, operands, pos }))
}

fn operand(cursor: &mut Cursor<'_>) -> Result<Operand, ParseError> {
    if cursor.at('{') {
        return Ok(Operand::Vector(vector(cursor)?));
    }
    if cursor.eat('(')? {
        return list(cursor);
    }
    if cursor.eat('[')? {
        return address(cursor);
    }
    if cursor.eat('!')? {
        return Ok(Operand::Not(cursor.name("a predicate register after `!`")?.to_owned()));
    }
    let first = element(cursor, "an operand")?;
    if !cursor.at('|') {
        return Ok(first);
    }
    let first = match first {
        Operand::Name(name) => name,
        Operand::Sink => "_".to_owned(),
        _ => return Err(cursor.expected("`,` or `;` after a number")),
    };
    cursor.advance()?;
    let second = cursor.name("a register after `|`")?;
    Ok(Operand::Pair(first, second.to_owned()))
}

/// What may stand in braces too: a name, a sum, a number, the sink.
fn element(cursor: &mut Cursor<'_>, expected: &str) -> Result<Operand, ParseError> {
    if cursor.at_number() {
        return Ok(match cursor.number("a number")? {
            Number::Int(value) => Operand::Int(value),
            Number::F32(bits) => Operand::F32(bits),
            Number::F64(bits) => Operand::F64(bits),
        });
    }
    let name = cursor.name_with_suffix(expected)?;
    if name == "_" {
        return Ok(Operand::Sink);
    }
    if cursor.at('+') || cursor.at('-') {
        return Ok(Operand::Sum(name, cursor.terms("a number of bytes")? as i64));
    }
    Ok(Operand::Name(name))
}

/// `{a, b}`
fn vector(cursor: &mut Cursor<'_>) -> Result<Vec<Operand>, ParseError> {
    cursor.expect('{')?;
    let mut elements = vec![element(cursor, "a vector element")?];
    while cursor.eat(',')? {
        elements.push(element(cursor, "a vector element")?);
    }
    if !cursor.eat('}')? {
        return Err(cursor.expected("`,` or `}` after a vector element"));
    }
    Ok(elements)
}

/// `a, b)`: parameters of a call.
fn list(cursor: &mut Cursor<'_>) -> Result<Operand, ParseError> {
    let mut elements = Vec::new();
    if !cursor.at(')') {
        elements.push(element(cursor, "a parameter")?);
        while cursor.eat(',')? {
            elements.push(element(cursor, "a parameter")?);
        }
    }
    if !cursor.eat(')')? {
        return Err(cursor.expected("`,` or `)` after a parameter"));
    }
    Ok(Operand::List(elements))
}

/// `base + offset, {coordinates}]`
fn address(cursor: &mut Cursor<'_>) -> Result<Operand, ParseError> {
    let (base, offset) = if cursor.at_number() {
        (Base::Absolute(cursor.integer("an address")?), 0)
    } else {
        let name = cursor.name_with_suffix("an address")?;
        (Base::Name(name), cursor.terms("a number of bytes")? as i64)
    };
    let coordinates = if cursor.eat(',')? { Some(vector(cursor)?) } else { None };
    if !cursor.eat(']')? {
        return Err(cursor.expected("`]` after an address"));
    }
    Ok(Operand::Address { base, offset, coordinates })
}
