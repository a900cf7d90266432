//! The syntax of GRUB's scripts (GNU GRUB manual, "Writing full configuration files"): words with quotes and
//! variables, `if`, `while`, `until`, `for`, functions, and blocks in braces.
//!
//! Parsing takes one pass over the text, and nesting is bounded.

use std::rc::Rc;

use super::GrubError;

/// Most levels of blocks inside each other.
const DEPTH: usize = 32;

/// A piece of a word.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Piece {
    /// Text, and whether it was quoted: a quoted piece makes a word even if it is empty.
    Text(String, bool),
    /// A variable. Its value becomes several words at its blanks unless it is quoted.
    Variable(String, bool),
}

/// A word, as its pieces.
pub(super) type Word = Vec<Piece>;

/// Commands in a row.
pub(super) type Script = Vec<Command>;

/// A script that is kept, by an entry of the menu or by a function.
pub(super) type Kept = Rc<Script>;

/// A command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Command {
    /// A command with its arguments, and the block behind them: of `menuentry` and `submenu`.
    Simple(Vec<Word>, Option<Kept>),
    /// Conditions with what is done if they hold, and what is done otherwise.
    If(Vec<(Script, Script)>, Script),
    /// A condition, whether the loop ends (`until`) or goes on (`while`) when it holds, and the body.
    While(Script, bool, Script),
    /// A variable, its values, and the body.
    For(String, Vec<Word>, Script),
    /// A function.
    Function(String, Kept),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Token {
    Word(Word),
    /// A line's end or `;`.
    End,
}

/// Parses a script. Errors if a block does not end, or ends without a beginning.
pub(super) fn parse(text: &str) -> Result<Script, GrubError> {
    let mut parser = Parser { tokens: tokens(text)?.into_iter().peekable(), depth: 0 };
    let script = parser.script(&[])?;
    match parser.tokens.next() {
        None => Ok(script),
        Some(_) => Err(GrubError::Syntax("a block ends that did not begin")),
    }
}

fn tokens(text: &str) -> Result<Vec<Token>, GrubError> {
    let mut tokens = Vec::new();
    let mut chars = text.chars().peekable();
    while let Some(&c) = chars.peek() {
        match c {
            '\n' | ';' => {
                chars.next();
                tokens.push(Token::End);
            }
            ' ' | '\t' | '\r' => drop(chars.next()),
            '#' => while chars.next_if(|c| *c != '\n').is_some() {},
            _ => tokens.push(Token::Word(word(&mut chars)?)),
        }
    }
    Ok(tokens)
}

type Chars<'a> = std::iter::Peekable<std::str::Chars<'a>>;

fn word(chars: &mut Chars<'_>) -> Result<Word, GrubError> {
    let mut word = Word::new();
    while let Some(&c) = chars.peek() {
        match c {
            ' ' | '\t' | '\r' | '\n' | ';' => break,
            '\'' => {
                chars.next();
                let mut quoted = String::new();
                loop {
                    match chars.next() {
                        Some('\'') => break,
                        Some(c) => quoted.push(c),
                        None => return Err(GrubError::Syntax("a quotation does not end")),
                    }
                }
                word.push(Piece::Text(quoted, true));
            }
            '"' => {
                chars.next();
                in_quotes(chars, &mut word)?;
            }
            '\\' => {
                chars.next();
                // A backslash at a line's end joins the lines.
                if let Some(c) = chars.next().filter(|c| *c != '\n') {
                    push_text(&mut word, c, false);
                }
            }
            '$' => variable(chars, &mut word, false),
            c => {
                chars.next();
                push_text(&mut word, c, false);
            }
        }
    }
    Ok(word)
}

/// The rest of `"..."`.
fn in_quotes(chars: &mut Chars<'_>, word: &mut Word) -> Result<(), GrubError> {
    word.push(Piece::Text(String::new(), true));
    loop {
        match chars.peek().copied() {
            Some('"') => {
                chars.next();
                return Ok(());
            }
            Some('$') => variable(chars, word, true),
            Some('\\') => {
                chars.next();
                match chars.next() {
                    Some(c @ ('"' | '\\' | '$')) => push_text(word, c, true),
                    Some('\n') => {}
                    Some(c) => {
                        push_text(word, '\\', true);
                        push_text(word, c, true);
                    }
                    None => return Err(GrubError::Syntax("a quotation does not end")),
                }
            }
            Some(c) => {
                chars.next();
                push_text(word, c, true);
            }
            None => return Err(GrubError::Syntax("a quotation does not end")),
        }
    }
}

fn push_text(word: &mut Word, c: char, quoted: bool) {
    match word.last_mut() {
        Some(Piece::Text(text, of)) if *of == quoted => text.push(c),
        _ => word.push(Piece::Text(c.to_string(), quoted)),
    }
}

/// `$NAME`, `${NAME}`, `$?`, `$1`; a `$` before anything else is itself.
fn variable(chars: &mut Chars<'_>, word: &mut Word, quoted: bool) {
    chars.next();
    let mut name = String::new();
    match chars.peek() {
        Some('{') => {
            chars.next();
            while let Some(c) = chars.next_if(|c| *c != '\n') {
                match c {
                    '}' => break,
                    c => name.push(c),
                }
            }
        }
        Some('?' | '#' | '*' | '@') => name.extend(chars.next()),
        _ => {
            while let Some(c) = chars.next_if(|c| c.is_ascii_alphanumeric() || *c == '_') {
                name.push(c);
            }
        }
    }
    match name.is_empty() {
        true => push_text(word, '$', quoted),
        false => word.push(Piece::Variable(name, quoted)),
    }
}

struct Parser {
    tokens: std::iter::Peekable<std::vec::IntoIter<Token>>,
    depth: usize,
}

impl Parser {
    /// Commands up to one of the words `ends`, which is left, or to the end of the text.
    fn script(&mut self, ends: &[&str]) -> Result<Script, GrubError> {
        self.depth += 1;
        if self.depth > DEPTH {
            return Err(GrubError::Syntax("there are more than 32 blocks inside each other"));
        }
        let mut script = Script::new();
        loop {
            while self.tokens.next_if_eq(&Token::End).is_some() {}
            match self.tokens.peek() {
                None => break,
                Some(token) if ends.iter().any(|end| is_keyword(token, end)) => break,
                Some(token) if is_keyword(token, "}") => break,
                Some(_) => script.push(self.command()?),
            }
        }
        self.depth -= 1;
        Ok(script)
    }

    fn command(&mut self) -> Result<Command, GrubError> {
        match self.keyword(&["if", "while", "until", "for", "function"]) {
            Some("if") => self.branches(),
            Some(kind @ ("while" | "until")) => {
                let condition = self.script(&["do"])?;
                Ok(Command::While(condition, kind == "until", self.block("do", "done")?))
            }
            Some("for") => {
                let name = self.name()?;
                self.expect("in")?;
                let values = self.words();
                while self.tokens.next_if_eq(&Token::End).is_some() {}
                Ok(Command::For(name, values, self.block("do", "done")?))
            }
            Some(_) => {
                let name = self.name()?;
                Ok(Command::Function(name, self.block("{", "}")?.into()))
            }
            None => {
                let words = self.words();
                let block = match self.tokens.peek() {
                    Some(token) if is_keyword(token, "{") => Some(self.block("{", "}")?.into()),
                    _ => None,
                };
                Ok(Command::Simple(words, block))
            }
        }
    }

    /// The rest of an `if`.
    fn branches(&mut self) -> Result<Command, GrubError> {
        let (mut branches, mut otherwise) = (Vec::new(), Script::new());
        let mut condition = self.script(&["then"])?;
        loop {
            self.expect("then")?;
            let body = self.script(&["elif", "else", "fi"])?;
            branches.push((condition, body));
            match self.keyword(&["elif", "else"]) {
                Some("elif") => condition = self.script(&["then"])?,
                Some(_) => {
                    otherwise = self.script(&["fi"])?;
                    break;
                }
                None => break,
            }
        }
        self.expect("fi")?;
        Ok(Command::If(branches, otherwise))
    }

    fn block(&mut self, begin: &'static str, end: &'static str) -> Result<Script, GrubError> {
        while self.tokens.next_if_eq(&Token::End).is_some() {}
        self.expect(begin)?;
        let script = self.script(&[end])?;
        self.expect(end)?;
        Ok(script)
    }

    /// The words up to the end of the command, or to a block.
    fn words(&mut self) -> Vec<Word> {
        let mut words = Vec::new();
        while let Some(token) = self.tokens.next_if(|token| {
            matches!(token, Token::Word(_)) && !is_keyword(token, "{") && !is_keyword(token, "}")
        }) {
            if let Token::Word(word) = token {
                words.push(word);
            }
        }
        words
    }

    fn name(&mut self) -> Result<String, GrubError> {
        match self.tokens.next() {
            Some(Token::Word(word)) => match word.as_slice() {
                [Piece::Text(name, false)] => Ok(name.clone()),
                _ => {
                    Err(GrubError::Syntax("the name after `for` or `function` is not a plain word"))
                }
            },
            _ => Err(GrubError::Syntax("there is no name after `for` or `function`")),
        }
    }

    fn keyword(&mut self, keywords: &[&'static str]) -> Option<&'static str> {
        let token = self.tokens.peek()?;
        let found = keywords.iter().find(|keyword| is_keyword(token, keyword))?;
        self.tokens.next();
        Some(found)
    }

    fn expect(&mut self, keyword: &'static str) -> Result<(), GrubError> {
        match self.keyword(&[keyword]) {
            Some(_) => Ok(()),
            None => Err(GrubError::Missing(keyword)),
        }
    }
}

fn is_keyword(token: &Token, keyword: &str) -> bool {
    match token {
        Token::Word(word) => {
            matches!(word.as_slice(), [Piece::Text(text, false)] if text == keyword)
        }
        Token::End => false,
    }
}
