//! From the text to the syntax tree.
//!
//! The text is trusted in nothing: whatever it holds, the result is a [`Module`] or a
//! [`ParseError`]. What the crate cannot simulate in principle (indirect calls, textures) is
//! refused here, by name; opcodes and operands get their meaning later.
mod cursor;
mod statement;
mod variable;

use crate::{
    ast::{Directives, Function, Item, Loc, Module, ParseError, Pos, Space, Variable},
    lexer::{Kind, error, unescape},
};
use cursor::Cursor;

/// Scopes may nest so deep; compilers and inline assembly use three or four levels.
const MAX_DEPTH: u32 = 64;

/// Reads a PTX file.
///
/// ```
/// let module = ptxsim::parser::parse(
///     ".version 8.0 .target sm_80 .address_size 64
///      .visible .entry nothing(.param .u64 p) { ret; }",
/// )?;
/// assert_eq!(module.functions[0].name, "nothing");
/// # Ok::<(), ptxsim::ast::ParseError>(())
/// ```
pub fn parse(source: &str) -> Result<Module, ParseError> {
    // Runtime compilers hand out their text with its terminating NUL.
    let cursor = Cursor::new(source.trim_end_matches('\0'))?;
    let mut parser = Parser { cursor, module: Module::default(), aliases: Vec::new() };
    parser.header()?;
    while parser.cursor.kind() != Kind::End {
        parser.directive()?;
    }
    parser.resolve_aliases()?;
    Ok(parser.module)
}

struct Parser<'a> {
    cursor: Cursor<'a>,
    module: Module,
    /// `.alias`: the new name, the function meant, where.
    aliases: Vec<(String, String, Pos)>,
}

impl<'a> Parser<'a> {
    /// `.version`, `.target` and, optionally, `.address_size`.
    fn header(&mut self) -> Result<(), ParseError> {
        let cursor = &mut self.cursor;
        if !cursor.eat_dotted("version")? {
            return Err(cursor.expected("`.version`"));
        }
        let version = cursor.text().split_once('.');
        self.module.version = version
            .and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)))
            .ok_or_else(|| cursor.expected("a version such as 8.0"))?;
        cursor.advance()?;
        if !cursor.eat_dotted("target")? {
            return Err(cursor.expected("`.target`"));
        }
        self.target()?;
        self.module.address_size = 32;
        if self.cursor.eat_dotted("address_size")? {
            self.address_size()?;
        }
        Ok(())
    }

    fn target(&mut self) -> Result<(), ParseError> {
        self.module.target = self.cursor.name("an architecture such as sm_90a")?.to_owned();
        while self.cursor.eat(',')? {
            let option = self.cursor.name("a target option")?;
            self.module.target.push_str(", ");
            self.module.target.push_str(option);
        }
        Ok(())
    }

    fn address_size(&mut self) -> Result<(), ParseError> {
        match self.cursor.kind() {
            Kind::Int(size @ (32 | 64)) => self.module.address_size = size as u32,
            _ => return Err(self.cursor.expected("32 or 64")),
        }
        self.cursor.advance()
    }

    /// Anything at module scope.
    fn directive(&mut self) -> Result<(), ParseError> {
        let Kind::Dotted(word) = self.cursor.kind() else {
            return Err(self.cursor.expected("a directive"));
        };
        match word {
            "target" => {
                self.cursor.advance()?;
                self.target()
            }
            "file" => self.file(),
            "loc" => self.loc().map(drop),
            "pragma" => self.pragma(),
            "section" => self.section(),
            "alias" => self.alias(),
            _ => self.declaration(),
        }
    }

    /// A variable or a function with its linkage.
    fn declaration(&mut self) -> Result<(), ParseError> {
        let mut external = false;
        while let Kind::Dotted(word @ ("visible" | "weak" | "extern" | "common")) =
            self.cursor.kind()
        {
            external |= word == "extern";
            self.cursor.advance()?;
        }
        if self.cursor.eat_dotted("entry")? {
            self.function(true, external)
        } else if self.cursor.eat_dotted("func")? {
            self.function(false, external)
        } else {
            let pos = self.cursor.pos();
            let word = self.cursor.eat_any_dotted()?;
            let space = word.and_then(variable::space);
            let Some(space @ (Space::Shared | Space::Global | Space::Const | Space::Local)) = space
            else {
                let found =
                    word.map_or_else(|| self.cursor.kind().to_string(), |w| format!("`.{w}`"));
                return Err(error(pos, format!("expected a directive of a module, found {found}")));
            };
            let found = variable::variables(&mut self.cursor, space, external)?;
            self.module.variables.extend(found);
            Ok(())
        }
    }

    /// `.file 1 "a.cu", 123, 456`
    fn file(&mut self) -> Result<(), ParseError> {
        let cursor = &mut self.cursor;
        cursor.advance()?;
        let index = cursor.small("the index of a file")?;
        let name = unescape(cursor.string("the name of a file in quotes")?);
        self.module.files.insert(index, name);
        while cursor.eat(',')? {
            // Time stamp and size.
            cursor.integer("a number")?;
        }
        Ok(())
    }

    /// `.loc 1 23 5, function_name $L__info_string0, inlined_at 1 40 3`
    fn loc(&mut self) -> Result<Loc, ParseError> {
        let loc = self.position()?;
        while self.cursor.eat(',')? {
            if self.cursor.eat_word("function_name")? {
                self.cursor.name("the label of a function's name")?;
                self.cursor.terms("a number of bytes")?;
            } else if self.cursor.kind() == Kind::Name("inlined_at") {
                self.position()?;
            } else {
                return Err(self.cursor.expected("`function_name` or `inlined_at`"));
            }
        }
        Ok(loc)
    }

    /// File, line and column after the current word.
    fn position(&mut self) -> Result<Loc, ParseError> {
        let cursor = &mut self.cursor;
        cursor.advance()?;
        Ok(Loc {
            file: cursor.small("the index of a file")?,
            line: cursor.small("a line number")?,
            column: cursor.small("a column number")?,
        })
    }

    /// `.pragma "nounroll", "…";`: advice to the real assembler.
    fn pragma(&mut self) -> Result<(), ParseError> {
        self.cursor.advance()?;
        self.cursor.string("a string")?;
        while self.cursor.eat(',')? {
            self.cursor.string("a string")?;
        }
        self.cursor.expect(';')
    }

    /// `.section .debug_info { … }`: data lines and labels for debuggers.
    fn section(&mut self) -> Result<(), ParseError> {
        let cursor = &mut self.cursor;
        cursor.advance()?;
        if cursor.eat_any_dotted()?.is_none() {
            return Err(cursor.expected("the name of a section"));
        }
        cursor.expect('{')?;
        while !cursor.eat('}')? {
            match cursor.kind() {
                Kind::Dotted(_) | Kind::Name(_) | Kind::Int(_) => cursor.advance()?,
                Kind::Punct(',' | ':' | '+' | '-') => cursor.advance()?,
                _ => return Err(cursor.expected("a line of data, a label or `}`")),
            }
        }
        Ok(())
    }

    /// `.alias name, function;`
    fn alias(&mut self) -> Result<(), ParseError> {
        self.cursor.advance()?;
        let pos = self.cursor.pos();
        let name = self.cursor.name("the name of a function")?.to_owned();
        self.cursor.expect(',')?;
        let meant = self.cursor.name("the name of a function")?.to_owned();
        self.cursor.expect(';')?;
        self.aliases.push((name, meant, pos));
        Ok(())
    }

    /// Gives each alias, which the text only declares, the body of the function it stands for.
    fn resolve_aliases(&mut self) -> Result<(), ParseError> {
        for (name, meant, pos) in &self.aliases {
            let functions = &mut self.module.functions;
            let found = functions.iter().find(|f| f.name == *meant && f.body.is_some());
            let Some(function) = found.filter(|f| !f.entry) else {
                let message = format!("expected a defined function to alias, found `{meant}`");
                return Err(error(*pos, message));
            };
            let alias = Function { name: name.clone(), pos: *pos, ..function.clone() };
            functions.retain(|f| f.name != *name || f.body.is_some());
            functions.push(alias);
        }
        Ok(())
    }

    fn function(&mut self, entry: bool, external: bool) -> Result<(), ParseError> {
        if self.cursor.eat_dotted("attribute")? {
            variable::skip_attribute(&mut self.cursor)?;
        }
        let returns = if !entry && self.cursor.at('(') { self.parameters()? } else { Vec::new() };
        let pos = self.cursor.pos();
        let name = self.cursor.name("the name of a function")?.to_owned();
        let params = if self.cursor.at('(') { self.parameters()? } else { Vec::new() };
        let directives = self.performance_directives()?;
        let body = if self.cursor.eat('{')? {
            Some(self.items(1)?)
        } else if self.cursor.eat(';')? {
            None
        } else {
            return Err(self.cursor.expected("`{`, `;` or a directive of a function"));
        };
        let function = Function { name, entry, external, returns, params, body, directives, pos };
        self.module.functions.push(function);
        Ok(())
    }

    fn parameters(&mut self) -> Result<Vec<Variable>, ParseError> {
        variable::parameters(&mut self.cursor)
    }

    fn performance_directives(&mut self) -> Result<Directives, ParseError> {
        let mut found = Directives::default();
        while let Kind::Dotted(word) = self.cursor.kind() {
            if word == "pragma" {
                self.pragma()?;
                continue;
            }
            let unknown = self.cursor.expected("`{`, `;` or a directive of a function");
            self.cursor.advance()?;
            match word {
                "maxntid" => found.max_threads = Some(self.extent()?),
                "reqntid" => found.required_threads = Some(self.extent()?),
                "reqnctapercluster" => found.cluster = Some(self.extent()?),
                "minnctapersm" | "maxnctapersm" => found.min_blocks = Some(self.count()?),
                "maxnreg" => found.max_registers = Some(self.count()?),
                "maxclusterrank" => found.max_cluster = Some(self.count()?),
                "explicitcluster" => found.explicit_cluster = true,
                "noreturn" => {}
                _ => return Err(unknown),
            }
        }
        Ok(found)
    }

    /// `128` or `16, 8, 2`
    fn extent(&mut self) -> Result<[u32; 3], ParseError> {
        let mut extent = [self.count()?, 1, 1];
        for size in &mut extent[1..] {
            if self.cursor.eat(',')? {
                *size = self.count()?;
            } else {
                break;
            }
        }
        Ok(extent)
    }

    fn count(&mut self) -> Result<u32, ParseError> {
        self.cursor.small("a number")
    }

    /// The statements of a scope with its `}`, after its `{`.
    fn items(&mut self, depth: u32) -> Result<Vec<Item>, ParseError> {
        let mut items = Vec::new();
        while !self.cursor.eat('}')? {
            match self.cursor.kind() {
                Kind::Punct('{') if depth == MAX_DEPTH => {
                    let message = format!("expected at most {MAX_DEPTH} nested scopes, found more");
                    return Err(error(self.cursor.pos(), message));
                }
                Kind::Punct('{') => {
                    self.cursor.advance()?;
                    items.push(Item::Block(self.items(depth + 1)?));
                }
                Kind::Dotted(word) => self.local_directive(word, &mut items)?,
                _ => items.push(statement::statement(&mut self.cursor)?),
            }
        }
        Ok(items)
    }

    /// A directive inside a function.
    fn local_directive(&mut self, word: &str, items: &mut Vec<Item>) -> Result<(), ParseError> {
        let refused = |what| Err(error(self.cursor.pos(), format!("`.{word}`: {what}")));
        match word {
            "loc" => items.push(Item::Loc(self.loc()?)),
            "file" => self.file()?,
            "pragma" => self.pragma()?,
            "callprototype" | "calltargets" => return refused("indirect calls are not supported"),
            "branchtargets" => return refused("indexed branches are not supported"),
            _ => {
                let Some(space) = variable::space(word) else {
                    return Err(self.cursor.expected("a declaration, an instruction or `}`"));
                };
                self.cursor.advance()?;
                let found = variable::variables(&mut self.cursor, space, false)?;
                items.extend(found.into_iter().map(Item::Variable));
            }
        }
        Ok(())
    }
}
