//! docs/architecture.md holds: every module belongs to a floor of its table, and imports run down.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Modules that hold re-exports alone.
const FACADES: [&str; 3] = ["", "cuda", "reference"];

/// A row of the table: its modules, and the floors it stands on.
struct Floor {
    modules: Vec<String>,
    stands_on: Vec<String>,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// What stands in backquotes.
fn quoted(cell: &str) -> Vec<String> {
    cell.split('`').skip(1).step_by(2).map(String::from).collect()
}

/// The table, top floor first.
fn floors() -> Vec<Floor> {
    let text = std::fs::read_to_string(root().join("docs/architecture.md")).expect("the document");
    let table = text.lines().skip_while(|line| !line.starts_with("| floor |")).skip(2);
    let rows = table.take_while(|line| line.starts_with('|'));
    let floors: Vec<Floor> = rows
        .map(|row| {
            let cells: Vec<&str> = row.trim_matches('|').split('|').collect();
            let [modules, _, stands_on] = cells[..] else { panic!("three cells expected: {row}") };
            Floor { modules: quoted(modules), stands_on: quoted(stands_on) }
        })
        .collect();
    assert!(floors.len() > 5, "the table is not where it was");
    floors
}

/// Every module of the crate, by path (`cuda::plan::call`; the crate itself is empty), with its text
/// up to its tests.
fn modules() -> BTreeMap<String, String> {
    fn walk(folder: &Path, found: &mut BTreeMap<String, String>) {
        for entry in std::fs::read_dir(folder).expect("a folder").flatten() {
            let path = entry.path();
            if path.is_dir() {
                walk(&path, found);
                continue;
            }
            let text = std::fs::read_to_string(&path).expect("a source");
            let code = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
            let path = path.with_extension("");
            let name = path.strip_prefix(root().join("src")).expect("below src");
            let parts: Vec<_> = name.iter().map(|part| part.to_string_lossy()).collect();
            let last = matches!(&*parts[parts.len() - 1], "mod" | "lib");
            let module = parts[..parts.len() - usize::from(last)].join("::");
            found.insert(module, code.to_owned());
        }
    }
    let mut found = BTreeMap::new();
    walk(&root().join("src"), &mut found);
    found
}

/// `a::{b, c::{d}}` as `a::b` and `a::c::d`.
fn paths(prefix: &str, tree: &str) -> Vec<String> {
    let Some((head, rest)) = tree.split_once('{') else {
        return vec![format!("{prefix}{}", tree.trim())];
    };
    let (prefix, body) = (format!("{prefix}{}", head.trim()), rest.rsplit_once('}').expect("}").0);
    let mut depth = 0;
    let top = |c: char| {
        depth += i32::from(c == '{') - i32::from(c == '}');
        c == ',' && depth == 0
    };
    body.split(top).filter(|part| !part.trim().is_empty()).flat_map(|p| paths(&prefix, p)).collect()
}

/// The modules that a module imports from, and what is imported.
fn imports(module: &str, all: &BTreeMap<String, String>) -> Vec<(String, String)> {
    let own: Vec<&str> = module.split("::").filter(|part| !part.is_empty()).collect();
    let statements = all[module].split(";\n").filter_map(|statement| {
        let line = statement.rfind("\nuse ").map(|at| at + 5);
        Some(statement[line.or(statement.starts_with("use ").then_some(4))?..].to_owned())
    });
    let mut found = Vec::new();
    for path in statements.flat_map(|tree| paths("", &tree)) {
        let parts: Vec<&str> = path.split("::").collect();
        let mut absolute: Vec<&str> = match parts[0] {
            "crate" => parts[1..].to_vec(),
            "super" => [&own[..own.len() - 1], &parts[1..]].concat(),
            _ => [&own[..], &parts[..]].concat(),
        };
        let inside = ["crate", "super"].contains(&parts[0]);
        while !all.contains_key(&absolute.join("::")) {
            absolute.pop();
        }
        let from = absolute.join("::");
        if inside || (from != module && from.starts_with(module)) {
            found.push((from, path));
        }
    }
    found
}

fn floor_of(module: &str, floors: &[Floor]) -> Option<usize> {
    let within = |name: &String| {
        module == name || module.strip_prefix(name.as_str()).is_some_and(|r| r.starts_with("::"))
    };
    floors.iter().position(|floor| floor.modules.iter().any(within))
}

/// The floors that one stands on, directly or not.
fn below(floor: usize, floors: &[Floor]) -> BTreeSet<usize> {
    let direct = floors[floor].stands_on.iter().map(|name| {
        let at = floor_of(name, floors).unwrap_or_else(|| panic!("no floor {name}"));
        assert!(at > floor, "{name} is not below {:?}", floors[floor].modules);
        at
    });
    direct.flat_map(|at| below(at, floors).into_iter().chain([at])).collect()
}

#[test]
fn imports_run_down() {
    let (all, floors) = (modules(), floors());
    let mut wrong = Vec::new();
    for module in all.keys().filter(|module| !FACADES.contains(&module.as_str())) {
        let Some(floor) = floor_of(module, &floors) else {
            wrong.push(format!("{module} stands on no floor"));
            continue;
        };
        let exports = |line: &str| line.starts_with("pub") && line.contains(" use ");
        if all[module].lines().any(|line| exports(line) && line.contains("::")) {
            wrong.push(format!("{module} re-exports"));
        }
        let below = below(floor, &floors);
        for (from, path) in imports(module, &all) {
            if FACADES.contains(&from.as_str()) {
                wrong.push(format!("{module} imports {path} through a re-export"));
            } else if !floor_of(&from, &floors).is_some_and(|at| at == floor || below.contains(&at))
            {
                wrong.push(format!("{module} imports {path} from above or beside"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn no_module_imports_itself_by_way_of_others() {
    let all = modules();
    let mut edges: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
    for module in all.keys().filter(|module| !FACADES.contains(&module.as_str())) {
        let from = imports(module, &all).into_iter().map(|(from, _)| from);
        edges.insert(module, from.filter(|from| from != module).collect());
    }
    assert!(edges.values().map(BTreeSet::len).sum::<usize>() > 200, "imports were not found");
    // Modules that import only what was taken away are taken away, until none is left.
    while !edges.is_empty() {
        let free = |imported: &BTreeSet<String>| !imported.iter().any(|m| edges.contains_key(&**m));
        let (gone, left): (Vec<_>, Vec<_>) = edges.iter().partition(|(_, from)| free(from));
        assert!(!gone.is_empty(), "in a circle, or importing one: {left:#?}");
        let gone: Vec<&str> = gone.into_iter().map(|(module, _)| *module).collect();
        edges.retain(|module, _| !gone.contains(module));
    }
}
