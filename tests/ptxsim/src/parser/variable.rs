//! Declarations of registers, parameters and variables, and their initialisers.
use super::cursor::{Cursor, Number};
use crate::{
    ast::{Init, ParseError, Space, Type, Variable},
    lexer::{Kind, error},
};

/// Bounds on what a declaration may ask for, so that later stages can compute sizes freely.
const MAX_REGISTERS: u32 = 1 << 24;
const MAX_BYTES: u64 = 1 << 40;
const MAX_DIMS: usize = 8;
/// Of an initialiser in which short inner lists are filled up with zeros: a short text must not
/// grow without bound. Compilers write such lists out in full.
const MAX_PADDED: u64 = 1 << 16;

/// The state space a directive names.
pub(super) fn space(word: &str) -> Option<Space> {
    Some(match word {
        "reg" => Space::Reg,
        "param" => Space::Param,
        "local" => Space::Local,
        "shared" => Space::Shared,
        "global" => Space::Global,
        "const" => Space::Const,
        _ => return None,
    })
}

/// `.align 8 .b8 a[16], b = 3;`, after the state space.
pub(super) fn variables(
    cursor: &mut Cursor<'_>,
    space: Space,
    external: bool,
) -> Result<Vec<Variable>, ParseError> {
    let kind = attributes(cursor)?;
    let mut variables = vec![declarator(cursor, space, external, &kind)?];
    while cursor.eat(',')? {
        variables.push(declarator(cursor, space, external, &kind)?);
    }
    if !cursor.eat(';')? {
        return Err(cursor.expected("`,` or `;` after a declaration"));
    }
    Ok(variables)
}

/// `(.param .b64 p, …)`
pub(super) fn parameters(cursor: &mut Cursor<'_>) -> Result<Vec<Variable>, ParseError> {
    let mut params = Vec::new();
    cursor.expect('(')?;
    while !cursor.at(')') {
        let space = if cursor.eat_dotted("param")? {
            Space::Param
        } else if cursor.eat_dotted("reg")? {
            Space::Reg
        } else {
            return Err(cursor.expected("a parameter"));
        };
        let kind = attributes(cursor)?;
        params.push(declarator(cursor, space, false, &kind)?);
        if !cursor.eat(',')? {
            break;
        }
    }
    if !cursor.eat(')')? {
        return Err(cursor.expected("`,` or `)` after a parameter"));
    }
    Ok(params)
}

/// `.attribute(.unified(1, 2))` and the like, which say nothing about the simulated memory.
pub(super) fn skip_attribute(cursor: &mut Cursor<'_>) -> Result<(), ParseError> {
    cursor.expect('(')?;
    let mut depth = 1u32;
    while depth > 0 {
        match cursor.kind() {
            Kind::Punct('(') => depth += 1,
            Kind::Punct(')') => depth -= 1,
            Kind::Dotted(_) | Kind::Int(_) | Kind::Punct(',') => {}
            _ => return Err(cursor.expected("an attribute or `)`")),
        }
        cursor.advance()?;
    }
    Ok(())
}

/// What the declared names of one statement share.
struct Attributes {
    align: Option<u32>,
    vector: u32,
    ty: Type,
}

fn attributes(cursor: &mut Cursor<'_>) -> Result<Attributes, ParseError> {
    let (mut align, mut vector, mut ty) = (None, 1, None);
    while let Kind::Dotted(word) = cursor.kind() {
        let pos = cursor.pos();
        match word {
            "align" => {
                cursor.advance()?;
                align = Some(alignment(cursor)?);
                continue;
            }
            "attribute" => {
                cursor.advance()?;
                skip_attribute(cursor)?;
                continue;
            }
            "v2" => vector = 2,
            "v4" => vector = 4,
            "ptr" if ty.is_some() => {
                cursor.advance()?;
                pointee(cursor)?;
                continue;
            }
            _ => match (word.parse::<Type>(), ty) {
                (Ok(found), None) => ty = Some(found),
                (Ok(_), Some(first)) => {
                    return Err(error(
                        pos,
                        format!("expected a name, found a second type after `.{first}`: `.{word}`"),
                    ));
                }
                (Err(_), None) => return Err(cursor.expected("a type")),
                (Err(_), Some(_)) => return Err(cursor.expected("a name")),
            },
        }
        cursor.advance()?;
    }
    let ty = ty.ok_or_else(|| cursor.expected("a type"))?;
    if vector * ty.size() > 16 {
        return Err(
            cursor.expected(&format!("a vector of at most 16 bytes instead of `.v{vector} .{ty}`"))
        );
    }
    Ok(Attributes { align, vector, ty })
}

/// What a pointer parameter points to: a hint, which the checks of memory make superfluous.
fn pointee(cursor: &mut Cursor<'_>) -> Result<(), ParseError> {
    if let Kind::Dotted("global" | "shared" | "const" | "local") = cursor.kind() {
        cursor.advance()?;
    }
    if cursor.eat_dotted("align")? {
        alignment(cursor)?;
    }
    Ok(())
}

fn alignment(cursor: &mut Cursor<'_>) -> Result<u32, ParseError> {
    match cursor.kind() {
        Kind::Int(value) if value.is_power_of_two() => cursor.small("a power of two below 2^32"),
        _ => Err(cursor.expected("a power of two")),
    }
}

fn declarator(
    cursor: &mut Cursor<'_>,
    space: Space,
    external: bool,
    shared: &Attributes,
) -> Result<Variable, ParseError> {
    let &Attributes { align, vector, ty } = shared;
    let pos = cursor.pos();
    let name = cursor.name("a name")?.to_owned();
    if ty == Type::Pred && space != Space::Reg {
        return Err(error(pos, format!("expected a register, `{name}` of type `.pred` is none")));
    }
    let range = if space == Space::Reg && cursor.eat('<')? {
        let count = cursor.small("a number of registers")?;
        cursor.expect('>')?;
        if count > MAX_REGISTERS {
            let message = format!("expected at most {MAX_REGISTERS} registers, found {count}");
            return Err(error(pos, message));
        }
        Some(count)
    } else {
        None
    };
    let dims = dimensions(cursor)?;
    let mut variable =
        Variable { space, align, ty, vector, name, range, dims, init: Vec::new(), external, pos };
    check_size(&variable)?;
    if matches!(space, Space::Global | Space::Const) && cursor.eat('=')? {
        initialise(cursor, &mut variable)?;
    }
    Ok(variable)
}

fn dimensions(cursor: &mut Cursor<'_>) -> Result<Vec<Option<u64>>, ParseError> {
    let mut dims = Vec::new();
    while cursor.at('[') {
        if dims.len() == MAX_DIMS {
            return Err(cursor.expected(&format!("at most {MAX_DIMS} dimensions")));
        }
        cursor.advance()?;
        if dims.is_empty() && cursor.eat(']')? {
            dims.push(None);
            continue;
        }
        dims.push(Some(cursor.integer("the size of a dimension")?));
        cursor.expect(']')?;
    }
    Ok(dims)
}

fn check_size(variable: &Variable) -> Result<(), ParseError> {
    let element = u64::from(variable.ty.size() * variable.vector);
    let sizes = variable.dims.iter().flatten();
    let bytes = sizes.fold(element, |bytes, &size| bytes.saturating_mul(size.max(1)));
    if bytes > MAX_BYTES {
        let message =
            format!("expected an array of at most 2^40 bytes, `{}` is larger", variable.name);
        return Err(error(variable.pos, message));
    }
    Ok(())
}

/// `3`, `{1, 2}`, `{{1, 2}, {3}}`, after the `=`.
fn initialise(cursor: &mut Cursor<'_>, variable: &mut Variable) -> Result<(), ParseError> {
    let mut shape = variable.dims.clone();
    if variable.vector > 1 {
        shape.push(Some(u64::from(variable.vector)));
    }
    if shape.is_empty() {
        variable.init.push(value(cursor, variable.ty)?);
        return Ok(());
    }
    fill(cursor, variable.ty, &shape, &mut variable.init)?;
    // The outermost dimension may be left for the initialiser to tell.
    if let Some(first @ None) = variable.dims.first_mut() {
        *first = Some((variable.init.len() as u64).div_ceil(count(&shape[1..]).max(1)));
    }
    Ok(())
}

/// Elements in an array of this shape. Cannot overflow: [`check_size`] has seen it.
fn count(shape: &[Option<u64>]) -> u64 {
    shape.iter().flatten().product()
}

/// One brace level. As in C, a list in braces stands for a whole inner array.
fn fill(
    cursor: &mut Cursor<'_>,
    ty: Type,
    shape: &[Option<u64>],
    init: &mut Vec<Init>,
) -> Result<(), ParseError> {
    let (pos, start) = (cursor.pos(), init.len());
    cursor.expect('{')?;
    let inner = count(&shape[1..]).max(1);
    let mut after_list = false;
    loop {
        let list = shape.len() > 1 && cursor.at('{');
        if list || after_list {
            pad(cursor, init, start, inner)?;
        }
        if list {
            fill(cursor, ty, &shape[1..], init)?;
        } else {
            init.push(value(cursor, ty)?);
        }
        after_list = list;
        if !cursor.eat(',')? {
            break;
        }
    }
    if !cursor.eat('}')? {
        return Err(cursor.expected("`,` or `}` in an initialiser"));
    }
    let (found, room) = (init.len() - start, count(shape));
    if shape[0].is_some() && found as u64 > room {
        return Err(error(pos, format!("expected at most {room} elements, found {found}")));
    }
    Ok(())
}

/// Zeros up to the next inner array.
fn pad(
    cursor: &Cursor<'_>,
    init: &mut Vec<Init>,
    start: usize,
    inner: u64,
) -> Result<(), ParseError> {
    let written = (init.len() - start) as u64;
    let missing = written.next_multiple_of(inner) - written;
    if missing > 0 && init.len() as u64 + missing > MAX_PADDED {
        let message = format!("at most {MAX_PADDED} elements where inner lists are short");
        return Err(cursor.expected(&message));
    }
    init.extend((0..missing).map(|_| Init::Bits(0)));
    Ok(())
}

fn value(cursor: &mut Cursor<'_>, ty: Type) -> Result<Init, ParseError> {
    let pos = cursor.pos();
    if !cursor.at_number() {
        return symbol_address(cursor, ty);
    }
    let number = cursor.number("a number")?;
    bits(number, ty).map(Init::Bits).ok_or_else(|| {
        let found = match number {
            Number::Int(value) => format!("{}", value as i64),
            Number::F32(bits) => format!("{}", f32::from_bits(bits)),
            Number::F64(bits) => format!("{}", f64::from_bits(bits)),
        };
        error(pos, format!("expected a value of type `.{ty}`, found {found}"))
    })
}

/// `symbol`, `symbol+8`, `generic(symbol)+8`
fn symbol_address(cursor: &mut Cursor<'_>, ty: Type) -> Result<Init, ParseError> {
    let pos = cursor.pos();
    let generic = cursor.eat_word("generic")?;
    if generic {
        cursor.expect('(')?;
    }
    let symbol = cursor.name("a number or a symbol")?.to_owned();
    if generic {
        cursor.expect(')')?;
    }
    if !matches!(ty, Type::B64 | Type::U64 | Type::S64 | Type::B32 | Type::U32 | Type::S32) {
        let message = format!("expected a value of type `.{ty}`, found the address of `{symbol}`");
        return Err(error(pos, message));
    }
    let offset = cursor.terms("a number of bytes")? as i64;
    Ok(Init::Address { symbol, offset })
}

/// The number in the given type, if it has a place there.
fn bits(number: Number, ty: Type) -> Option<u64> {
    use Type::*;
    match (number, ty) {
        (Number::Int(value), F32) => Some(u64::from((value as i64 as f32).to_bits())),
        (Number::Int(value), F64) => Some((value as i64 as f64).to_bits()),
        (Number::Int(_), Pred | F16 | F16x2 | Bf16 | Bf16x2) => None,
        (Number::Int(value), B128) => Some(value).filter(|&v| v as i64 >= 0),
        (Number::Int(value), _) => {
            // Either sign is accepted, as compilers write bytes as -1 or as 255.
            let unused = 64 - 8 * ty.size();
            let bits = value << unused >> unused;
            let negative = (value << unused) as i64 >> unused;
            (bits == value || negative as u64 == value).then_some(bits)
        }
        (Number::F32(bits), F32 | B32) => Some(u64::from(bits)),
        (Number::F32(bits), F64) => Some(f64::from(f32::from_bits(bits)).to_bits()),
        (Number::F64(bits), F64 | B64) => Some(bits),
        (Number::F64(bits), F32) => Some(u64::from((f64::from_bits(bits) as f32).to_bits())),
        _ => None,
    }
}
