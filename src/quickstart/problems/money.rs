//! Problems about prices, change and savings.

use super::Operator::{Minus, Plus, Times};
use super::{Draft, Draw, dollars, draft};

/// Number of things times the price of one.
pub fn shopping_total(draw: &mut Draw) -> Draft {
    let (who, what) = (draw.person(), draw.thing());
    let (name, pronoun, many) = (who.name, who.pronoun, what.many);
    let (number, price) = (draw.number(2, 9), draw.number(2, 9));
    let question = match draw.number(0, 2) {
        0 => format!("{name} buys {number} {many} for ${price} each. How much does {pronoun} pay?"),
        1 => format!("One {} costs ${price}. How much do {number} {many} cost {name}?", what.one),
        _ => format!("{name} sells {number} {many} at ${price} each. How much does {pronoun} earn?"),
    };
    let total = dollars(number, Times, price);
    draft(question, [format!("The {many} cost {}.", total.text)], total.value)
}

/// What comes back from a note.
pub fn change(draw: &mut Draw) -> Draft {
    let (who, what) = (draw.person(), draw.thing());
    let (name, one) = (who.name, what.one);
    let paid = draw.pick(&[10, 20, 30]);
    let price = draw.number(2, paid - 1);
    let question = match draw.number(0, 1) {
        0 => format!("{name} pays for the ${price} {one} with ${paid}. How much change does {} get?", who.pronoun),
        _ => format!("{name} has ${paid} and buys one {one} for ${price}. How much money is left?"),
    };
    let left = dollars(paid, Minus, price);
    draft(question, [format!("{name} has {} left.", left.text)], left.value)
}

/// The total first, then the change.
pub fn total_and_change(draw: &mut Draw) -> Draft {
    let (who, what) = (draw.person(), draw.thing());
    let (name, many) = (who.name, what.many);
    let (number, price) = (draw.number(2, 9), draw.number(2, 4));
    let total = dollars(number, Times, price);
    let paid = 10 * (total.value / 10 + 1);
    let question = match draw.number(0, 1) {
        0 => format!("{name} has ${paid} and buys {number} {many} for ${price} each. How much money is left?"),
        _ => format!("{name} buys {number} {many} at ${price} each and pays ${paid}. How much is the change?"),
    };
    let left = dollars(paid, Minus, total.value);
    let steps = [format!("The {many} cost {}.", total.text), format!("{name} has {} left.", left.text)];
    draft(question, steps, left.value)
}

/// A sum saved every week on top of what is there.
pub fn savings(draw: &mut Draw) -> Draft {
    let who = draw.person();
    let (name, pronoun) = (who.name, who.pronoun);
    let (weekly, weeks, start) = (draw.number(2, 9), draw.number(2, 9), 10 * draw.number(1, 5));
    let question = match draw.number(0, 1) {
        0 => {
            format!("{name} has ${start} and saves ${weekly} a week. How much does {pronoun} have after {weeks} weeks?")
        }
        _ => format!("{name} has ${start} and earns ${weekly} a day for {weeks} days. How much is it in all?"),
    };
    let saved = dollars(weekly, Times, weeks);
    let total = dollars(saved.value, Plus, start);
    let steps = [format!("{name} gets {}.", saved.text), format!("In all it is {}.", total.text)];
    draft(question, steps, total.value)
}
