//! State is saved field by field: `save` and `encode` take their value apart without `..`, so a new
//! field does not compile until somebody says what becomes of it.

use syn::visit::{self, Visit};
use syn::{Expr, FnArg, ImplItem, ImplItemFn, Item, Pat, Stmt};

use crate::source::Source;
use crate::wrong;

/// The functions of a trait that read a whole value.
const READERS: [(&str, &str); 2] = [("Persist", "save"), ("Schema", "encode")];

/// `save` and `encode` functions that do not take `self` apart completely.
fn incomplete(source: &Source) -> Vec<String> {
    let impls = source.file.items.iter().filter_map(|item| match item {
        Item::Impl(item) => Some(item),
        _ => None,
    });
    let mut found = Vec::new();
    for item in impls {
        let Some((_, path, _)) = &item.trait_ else { continue };
        let name = path.segments.last().unwrap().ident.to_string();
        for function in item.items.iter().filter_map(|item| match item {
            ImplItem::Fn(function) => Some(function),
            _ => None,
        }) {
            let reads = READERS.iter().any(|(of, fun)| name == *of && function.sig.ident == fun);
            if reads && !takes_apart(function) {
                let line = format!("{}: `{name}::{}`", source.name, function.sig.ident);
                found.push(format!("{line} must destructure `self` first, without `..`"));
            }
        }
    }
    found
}

fn takes_apart(function: &ImplItemFn) -> bool {
    assert!(matches!(function.sig.inputs.first(), Some(FnArg::Receiver(_))));
    let complete = |pattern: &Pat| {
        let mut rests = Rests(0);
        rests.visit_pat(pattern);
        let whole = matches!(pattern, Pat::Struct(_) | Pat::TupleStruct(_) | Pat::Path(_));
        // A unit struct is a name: `let Self = self`.
        let unit = matches!(pattern, Pat::Ident(name) if name.ident == "Self");
        rests.0 == 0 && (whole || unit)
    };
    let variants = |expression: &Expr| match expression {
        Expr::Match(matched) => {
            is_self(&matched.expr) && matched.arms.iter().all(|arm| complete(&arm.pat))
        }
        _ => false,
    };
    function.block.stmts.iter().any(|statement| match statement {
        Stmt::Local(local) => local.init.as_ref().is_some_and(|init| {
            variants(&init.expr) || (is_self(&init.expr) && complete(&local.pat))
        }),
        Stmt::Expr(expression, _) => variants(expression),
        _ => false,
    })
}

fn is_self(expression: &Expr) -> bool {
    match expression {
        Expr::Path(path) => path.path.is_ident("self"),
        Expr::Unary(unary) => is_self(&unary.expr),
        Expr::Reference(reference) => is_self(&reference.expr),
        _ => false,
    }
}

/// Counts the `..` of a pattern.
struct Rests(usize);

impl<'ast> Visit<'ast> for Rests {
    fn visit_pat_rest(&mut self, _: &'ast syn::PatRest) {
        self.0 += 1;
    }

    fn visit_pat_struct(&mut self, pattern: &'ast syn::PatStruct) {
        self.0 += usize::from(pattern.rest.is_some());
        visit::visit_pat_struct(self, pattern);
    }
}

#[test]
fn a_state_is_saved_field_by_field() {
    assert_eq!(wrong(incomplete), Vec::<String>::new());
}

#[test]
fn a_save_that_may_forget_a_field_is_seen() {
    let save = |body: &str| {
        let text = format!("impl Persist for Port {{ fn save(&self) -> R {{ {body} }} }}");
        incomplete(&Source::parse("devices/port.rs", &["devices", "port"], &text))
    };
    for body in [
        "Ok(S { a: self.a })",
        "let Self { a, .. } = self; Ok(S { a: *a })",
        "let a = &self.a; Ok(S { a: *a })",
        "// let Self { a } = self;\nOk(S { a: self.a })",
        "let Self { a: Inner { b, .. } } = self; Ok(S { b: *b })",
        "let other = Self { a: 1 }; let Self { a } = other; Ok(S { a })",
        "match self { Self::One(a) => Ok(S { a: *a }), _ => todo!() }",
        "f(|| { let Self { a } = self; }); Ok(S {})",
    ] {
        assert_eq!(save(body).len(), 1, "{body}");
    }
    for body in [
        "let Self { a } = self; Ok(S { a: *a })",
        "let Self(a) = *self; Ok(S { a })",
        "match self { Self::One(a) => Ok(S { a: *a }), Self::Two => Err(E) }",
        "let a = match self { Self::One(a) => a, Self::Two => &0 }; Ok(S { a: *a })",
    ] {
        assert_eq!(save(body), Vec::<String>::new(), "{body}");
    }
}
