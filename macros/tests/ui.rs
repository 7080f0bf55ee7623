//! Each mistake with the derive gives one error, at the right place, that names the fix.

/// A file in `ui/` is named after the mistake in it, and its `.stderr` holds what the compiler says, which changes
/// with its versions: to write it anew, run this with `TRYBUILD=overwrite`, and read the difference.
#[test]
fn mistakes_name_their_fix() {
    trybuild::TestCases::new().compile_fail("tests/ui/*.rs");
}
