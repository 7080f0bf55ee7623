//! Each mistake with the derive gives one error, at the right place, that names the fix.

/// A file in `ui/` is named after the mistake in it, and its `.stderr` holds what the compiler says, which changes
/// with its versions: to write it anew, run this with `TRYBUILD=overwrite`, and read the difference.
#[test]
fn mistakes_name_their_fix() {
    trybuild::TestCases::new().compile_fail("tests/ui/*.rs");
}

/// All that is allowed to be said is said once.
#[test]
fn each_mistake_is_one_error() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/ui");
    let mut seen = 0;
    for file in std::fs::read_dir(folder).unwrap() {
        let path = file.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "stderr") {
            let said = std::fs::read_to_string(&path).unwrap();
            assert_eq!(said.lines().filter(|line| line.starts_with("error")).count(), 1, "{}", path.display());
            seen += 1;
        }
    }
    assert!(seen > 30, "where are they?");
}

/// Each mistake with a handler is said where it is given to a service, and its note names the fix.
#[test]
fn mistakes_with_handlers_are_explained() {
    trybuild::TestCases::new().compile_fail("tests/handlers/*.rs");
}
