//! Problems about rates, distances, days and rows.

use super::Operator::{Minus, Plus, Times};
use super::{Draft, Draw, count, draft};

/// So many an hour for so many hours.
pub fn rate(draw: &mut Draw) -> Draft {
    let (who, what) = (draw.person(), draw.thing());
    let (name, pronoun, many) = (who.name, who.pronoun, what.many);
    let verb = draw.pick(&["packs", "counts", "sorts", "sells"]);
    let unit = draw.pick(&["hour", "day", "week"]);
    let (rate, time) = (draw.number(2, 9), draw.number(2, 9));
    let question = match draw.number(0, 1) {
        0 => format!("{name} {verb} {rate} {many} every {unit}. How many {many} is that in {time} {unit}s?"),
        _ => format!("Every {unit} {name} {verb} {rate} {many}. How many does {pronoun} have after {time} {unit}s?"),
    };
    let all = count(rate, Times, time);
    draft(question, [format!("{name} {verb} {} {many}.", all.text)], all.value)
}

/// Speed times time, or a way shared out over hours.
pub fn distance(draw: &mut Draw) -> Draft {
    let who = draw.person();
    let (name, pronoun) = (who.name, who.pronoun);
    let verb = draw.pick(&["drives", "rides", "travels"]);
    let (speed, hours) = (10 * draw.number(1, 6), draw.number(2, 9));
    if draw.number(0, 1) == 0 {
        let question = format!("{name} {verb} {speed} miles an hour for {hours} hours. How far does {pronoun} go?");
        let way = count(speed, Times, hours);
        return draft(question, [format!("{name} {verb} {} miles.", way.text)], way.value);
    }
    let (first, second) = (draw.number(5, 40), draw.easy(50));
    let question = format!("{name} {verb} {first} miles and then {second} miles more. How far does {pronoun} go?");
    let way = count(first, Plus, second);
    draft(question, [format!("{name} {verb} {} miles.", way.text)], way.value)
}

/// Two days, or the second day told by the first.
pub fn days(draw: &mut Draw) -> Draft {
    let (who, what) = (draw.person(), draw.thing());
    let (name, many) = (who.name, what.many);
    let verb = draw.pick(&["packs", "counts", "sorts", "sells"]);
    let (first_day, second_day) =
        draw.pick(&[("on Monday", "on Tuesday"), ("on Friday", "on Saturday"), ("in May", "in June")]);
    let first = draw.number(5, 40);
    if draw.number(0, 1) == 0 {
        let second = draw.easy(50);
        let question =
            format!("{name} {verb} {first} {many} {first_day} and {second} {second_day}. How many is that in all?");
        let all = count(first, Plus, second);
        return draft(question, [format!("In all it is {} {many}.", all.text)], all.value);
    }
    let more = draw.number(2, 9);
    let question = format!(
        "{name} {verb} {first} {many} {first_day} and {more} more than that {second_day}. \
         How many {many} is that {second_day}?"
    );
    let second = count(first, Plus, more);
    draft(question, [format!("{name} {verb} {} {many} {second_day}.", second.text)], second.value)
}

/// Rows of things, then some are gone or added.
pub fn rows(draw: &mut Draw) -> Draft {
    let (who, what) = (draw.person(), draw.thing());
    let (name, pronoun, many) = (who.name, who.pronoun, what.many);
    let (rows, each) = (draw.number(2, 9), draw.number(3, 9));
    let all = count(rows, Times, each);
    let other = draw.easy(all.value.min(12) - 2);
    let first = format!("There are {} {many}.", all.text);
    if draw.number(0, 1) == 0 {
        let question =
            format!("{name} has {rows} rows of {each} {many} and takes {other} away. How many {many} are left?");
        let left = count(all.value, Minus, other);
        return draft(question, [first, format!("{name} has {} {many} left.", left.text)], left.value);
    }
    let question =
        format!("{name} sets {rows} rows of {each} {many} and adds {other}. How many {many} does {pronoun} have now?");
    let now = count(all.value, Plus, other);
    draft(question, [first, format!("{name} has {} {many}.", now.text)], now.value)
}
