//! Rows as a page takes them: columns of little-endian numbers in base64.

use super::rows::Rows;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};

/// Columns that need all digits: they count, and 32-bit floats end at 16 million.
const EXACT: &[&str] = &["step", "tokens", "elapsed_s"];

/// Columns that no page shows.
const LEFT_OUT: &[&str] = &["time"];

/// {rows, columns: [{name, type}], base64}
pub fn block(rows: &Rows) -> Value {
    let mut bytes = Vec::new();
    let mut columns = Vec::new();
    for (name, values) in rows.columns().filter(|(name, _)| !LEFT_OUT.contains(name)) {
        let exact = EXACT.contains(&name);
        columns.push(json!({ "name": name, "type": if exact { "f64" } else { "f32" } }));
        match exact {
            true => values.iter().for_each(|value| bytes.extend(value.to_le_bytes())),
            false => values.iter().for_each(|value| bytes.extend((*value as f32).to_le_bytes())),
        }
    }
    json!({ "rows": rows.len(), "columns": columns, "base64": BASE64_STANDARD.encode(bytes) })
}

/// {name: [values]}, `null` where there is none.
pub fn lists(rows: &Rows) -> Value {
    let shown = rows.columns().filter(|(name, _)| !LEFT_OUT.contains(name));
    shown.map(|(name, values)| (name.to_owned(), json!(values))).collect::<serde_json::Map<_, _>>().into()
}
