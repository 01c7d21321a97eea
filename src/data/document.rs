//! A document: the text between two begin-of-text tokens.

/// Whether a text starts a document.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opening {
    /// It does: begin-of-text goes before it.
    Begins,
    /// It goes on where the text before it in the file stopped.
    Continues,
}

/// A text to tokenise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    pub opening: Opening,
    pub text: String,
}

/// What a unit of a text source holds.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct UnitText {
    /// In the file's order.
    pub documents: Vec<Document>,
    /// Rows or lines left out because their text is null.
    pub nulls: u64,
}
