//! Problems about two people: giving, comparing, doubling and ages.

use super::Operator::{Minus, Plus, Times};
use super::{Draft, Draw, count, draft};

/// Gives away once or twice.
pub fn giving(draw: &mut Draw) -> Draft {
    let ((who, other), what) = (draw.people(), draw.thing());
    let (name, pronoun, many) = (who.name, who.pronoun, what.many);
    let start = draw.number(12, 60);
    let first = draw.easy(start - 4);
    if draw.number(0, 1) == 0 {
        let question = format!(
            "{name} has {start} {many} and gives {first} to {}. How many does {pronoun} have left?",
            other.name
        );
        let left = count(start, Minus, first);
        return draft(question, [format!("{name} has {} {many} left.", left.text)], left.value);
    }
    let second = draw.number(2, 9.min(start - first - 2));
    let question = format!(
        "{name} has {start} {many}, gives {first} to {} and loses {second}. How many does {pronoun} have left?",
        other.name
    );
    let between = count(start, Minus, first);
    let left = count(between.value, Minus, second);
    let steps = [format!("First it is {} {many}.", between.text), format!("{name} has {} {many} left.", left.text)];
    draft(question, steps, left.value)
}

/// How many more, or how many together.
pub fn comparing(draw: &mut Draw) -> Draft {
    let ((one, two), what) = (draw.people(), draw.thing());
    let many = what.many;
    if draw.number(0, 1) == 0 {
        let less = draw.easy(50);
        let more = less + draw.number(2, 30);
        let question = format!(
            "{} has {more} {many} and {} has {less}. How many more {many} does {} have?",
            one.name, two.name, one.name
        );
        let gap = count(more, Minus, less);
        return draft(question, [format!("{} has {} {many} more.", one.name, gap.text)], gap.value);
    }
    let (less, difference) = (draw.number(3, 20), draw.number(2, 9));
    let question = format!(
        "{} has {less} {many} and {} has {difference} more than {}. How many do they have together?",
        one.name, two.name, one.name
    );
    let second = count(less, Plus, difference);
    let together = count(less, Plus, second.value);
    let steps =
        [format!("{} has {} {many}.", two.name, second.text), format!("Together they have {} {many}.", together.text)];
    draft(question, steps, together.value)
}

/// Two or three times as many, one person's or both together.
pub fn doubling(draw: &mut Draw) -> Draft {
    let ((one, two), what) = (draw.people(), draw.thing());
    let many = what.many;
    let first = draw.number(3, 20);
    let (times, word) = draw.pick(&[(2, "twice"), (3, "three times")]);
    let second = count(first, Times, times);
    let step = format!("{} has {} {many}.", two.name, second.text);
    let start = format!("{} has {first} {many}. {} has {word} as many.", one.name, two.name);
    if draw.number(0, 1) == 0 {
        return draft(format!("{start} How many {many} does {} have?", two.name), [step], second.value);
    }
    let together = count(first, Plus, second.value);
    let steps = [step, format!("Together they have {} {many}.", together.text)];
    draft(format!("{start} How many do they have together?"), steps, together.value)
}

/// Older or younger, then some years on.
pub fn ages(draw: &mut Draw) -> Draft {
    let (one, two) = draw.people();
    let age = draw.number(12, 40);
    let (gap, years) = (draw.number(2, 9), draw.number(2, 9));
    let (operator, word) = draw.pick(&[(Plus, "older"), (Minus, "younger")]);
    let question = match draw.number(0, 1) {
        0 => format!(
            "{} is {age} years old. {} is {gap} years {word}. How old will {} be in {years} years?",
            one.name, two.name, two.name
        ),
        _ => format!(
            "{} is {gap} years {word} than {}, who is {age}. How old is {} in {years} years?",
            two.name, one.name, two.name
        ),
    };
    let now = count(age, operator, gap);
    let then = count(now.value, Plus, years);
    let steps = [
        format!("{} is {} years old now.", two.name, now.text),
        format!("In {years} years it is {} years.", then.text),
    ];
    draft(question, steps, then.value)
}
