//! Problems about sharing, packing and halving.

use super::Operator::{Minus, Over, Plus, Times};
use super::{Draft, Draw, count, draft};

/// An exact division among friends.
pub fn equally(draw: &mut Draw) -> Draft {
    let (who, what) = (draw.person(), draw.thing());
    let (name, many) = (who.name, what.many);
    let (friends, each) = (draw.number(2, 9), draw.number(2, 9));
    let all = friends * each;
    let question = match draw.number(0, 1) {
        0 => format!("{name} shares {all} {many} equally among {friends} friends. How many does each friend get?"),
        _ => format!("{friends} friends of {name} share {all} {many} equally. How many {many} does each get?"),
    };
    let share = count(all, Over, friends);
    draft(question, [format!("Each gets {} {many}.", share.text)], share.value)
}

/// How many boxes an exact number fills.
pub fn boxes(draw: &mut Draw) -> Draft {
    let (who, what) = (draw.person(), draw.thing());
    let (name, pronoun, many) = (who.name, who.pronoun, what.many);
    let container = draw.pick(&["bags", "boxes", "jars", "trays"]);
    let (size, number) = (draw.number(2, 9), draw.number(2, 9));
    let all = size * number;
    let question = match draw.number(0, 1) {
        0 => format!("{name} packs {all} {many} in {container} of {size}. How many {container} does {pronoun} fill?"),
        _ => format!("{name} has {all} {many}. How many {container} of {size} can {pronoun} fill?"),
    };
    let filled = count(all, Over, size);
    draft(question, [format!("{name} fills {} {container}.", filled.text)], filled.value)
}

/// Full groups and what is over, asked from either side.
pub fn leftovers(draw: &mut Draw) -> Draft {
    let (who, what) = (draw.person(), draw.thing());
    let (name, pronoun, many) = (who.name, who.pronoun, what.many);
    let container = draw.pick(&["bags", "boxes", "jars", "trays"]);
    let (number, size) = (draw.number(2, 9), draw.number(2, 9));
    let packed = count(number, Times, size);
    let over = draw.number(2, 9);
    let packing = format!("The {container} hold {} {many}.", packed.text);
    if draw.number(0, 1) == 0 {
        let question = format!(
            "{name} fills {number} {container} with {size} {many} each and has {over} left. \
             How many {many} does {pronoun} have?"
        );
        let all = count(packed.value, Plus, over);
        return draft(question, [packing, format!("{name} has {} {many}.", all.text)], all.value);
    }
    let all = packed.value + over;
    let question =
        format!("{name} has {all} {many} and fills {number} {container} with {size} each. How many are left?");
    let left = count(all, Minus, packed.value);
    draft(question, [packing, format!("{name} has {} {many} left.", left.text)], left.value)
}

/// Half of a number is gone, then a few more.
pub fn half(draw: &mut Draw) -> Draft {
    let (who, what) = (draw.person(), draw.thing());
    let (name, pronoun, many) = (who.name, who.pronoun, what.many);
    let rest = draw.number(4, 20);
    let verb = draw.pick(&["sells", "loses", "gives away"]);
    let half = count(2 * rest, Over, 2);
    let more = draw.number(2, 9);
    let question = match draw.number(0, 1) {
        0 => format!(
            "{name} has {} {many} and {verb} half of them. Then {pronoun} buys {more} more. How many does {pronoun} have now?",
            2 * rest
        ),
        _ => format!(
            "{name} {verb} half of {} {many} and then finds {more} more. How many {many} does {pronoun} have now?",
            2 * rest
        ),
    };
    let now = count(half.value, Plus, more);
    let steps = [format!("Half is {} {many}.", half.text), format!("{name} has {} {many}.", now.text)];
    draft(question, steps, now.value)
}
