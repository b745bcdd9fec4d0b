"""Two exercises of a paper that does not exist, for the tests of the framework."""

from attnlab.exercises import Exercise, accept, reject


def check_double(double):
    if double(3) == 9:
        return reject("Your function squares: it gives 9 for 3.")
    if double(3) != 6:
        return reject(f"double(3) is {double(3)}, not 6.")
    return accept("Three doubled is six.")


def solve_double(x):
    """Twice x."""
    return 2 * x  # by definition


def fails(x):
    return x.no_such_attribute


def check_total(total):
    if total.startswith("5"):
        return reject("That is the count, not the sum.")
    return accept("Ten it is.") if total == "10" else reject(f"The sum is not {total}.")


def solve_total():
    return str(sum(range(5)))


EXERCISES = [
    Exercise(
        number=1,
        title="Double a number",
        difficulty="medium",
        minutes=5,
        answer_is="function",
        checker=check_double,
        solution=solve_double,
        wrong={"squares instead": lambda x: x * x, "raises": fails},
        hints=("What is <twice> three?", "Multiply by 2."),
    ),
    Exercise(
        number=2,
        title="Add up",
        difficulty="easy",
        minutes=1,
        answer_is="value",
        checker=check_total,
        solution=solve_total,
        wrong={"counts instead": "5"},
    ),
]
