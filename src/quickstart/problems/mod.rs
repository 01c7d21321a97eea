//! The kinds of word problems. Each is one function that draws its numbers and words and words its own solution.
//!
//! The numbers are chosen for a model of about a million parameters that sees each arithmetic fact only tens of times:
//! products stay in the table up to 9 x 9 (or tens times one digit), sums and differences under about 100.

mod counting;
mod measures;
mod money;
mod people;
mod sharing;

use super::draw::Draw;

/// A problem as its kind words it.
pub struct Draft {
    pub question: String,
    /// One line of the solution each.
    pub steps: Vec<String>,
    /// The value of the last step.
    pub result: u32,
}

/// One kind of problem.
pub struct Kind {
    pub name: &'static str,
    pub draft: fn(&mut Draw) -> Draft,
}

/// The kinds that pre-training sees; the corpus draws from them evenly.
pub const KINDS: [Kind; 16] = [
    Kind { name: "shopping total", draft: money::shopping_total },
    Kind { name: "change", draft: money::change },
    Kind { name: "total and change", draft: money::total_and_change },
    Kind { name: "savings", draft: money::savings },
    Kind { name: "sharing equally", draft: sharing::equally },
    Kind { name: "filling boxes", draft: sharing::boxes },
    Kind { name: "groups and leftovers", draft: sharing::leftovers },
    Kind { name: "half", draft: sharing::half },
    Kind { name: "rate times time", draft: counting::rate },
    Kind { name: "distance", draft: counting::distance },
    Kind { name: "sum over days", draft: counting::days },
    Kind { name: "rows", draft: counting::rows },
    Kind { name: "remaining after giving", draft: people::giving },
    Kind { name: "comparing", draft: people::comparing },
    Kind { name: "doubling", draft: people::doubling },
    Kind { name: "ages", draft: people::ages },
];

/// The kinds that fine-tuning teaches.
pub const SECOND_KINDS: [Kind; 5] = [
    Kind { name: "perimeter", draft: measures::perimeter },
    Kind { name: "average", draft: measures::average },
    Kind { name: "minutes", draft: measures::minutes },
    Kind { name: "legs", draft: measures::legs },
    Kind { name: "lowered price", draft: measures::lowered_price },
];

/// A calculation written out with its calculator mark, such as `6*4=<<6*4=24>>24`.
struct Worked {
    text: String,
    value: u32,
}

/// What a calculation counts.
#[derive(Clone, Copy)]
enum Unit {
    Count,
    Dollars,
}

/// The four operations.
#[derive(Clone, Copy)]
enum Operator {
    Plus,
    Minus,
    Times,
    Over,
}

/// Works out `left operator right` and writes it down.
fn work(left: u32, operator: Operator, right: u32, unit: Unit) -> Worked {
    let (symbol, value) = match operator {
        Operator::Plus => ('+', left + right),
        Operator::Minus => ('-', left - right),
        Operator::Times => ('*', left * right),
        Operator::Over => ('/', left / right),
    };
    let sign = match unit {
        Unit::Count => "",
        Unit::Dollars => "$",
    };
    Worked { text: format!("{left}{symbol}{right}={sign}<<{left}{symbol}{right}={value}>>{value}"), value }
}

fn count(left: u32, operator: Operator, right: u32) -> Worked {
    work(left, operator, right, Unit::Count)
}

fn dollars(left: u32, operator: Operator, right: u32) -> Worked {
    work(left, operator, right, Unit::Dollars)
}

fn draft(question: String, steps: impl Into<Vec<String>>, result: u32) -> Draft {
    Draft { question, steps: steps.into(), result }
}
