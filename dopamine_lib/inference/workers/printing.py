"""What the patient's commands print of their answers."""

import json

#: Of more classes than these the five most probable are printed.
MOST_SHOWN = 20


def print_answers(answers: list[tuple[str, dict]], seconds: float, as_json: bool) -> None:
    """One answer at length; several in a line each, and what they cost together."""
    if as_json:
        for name, answer in answers:
            print(json.dumps(answer if len(answers) == 1 else {"image": name} | answer))
        return
    if len(answers) == 1:
        _print_one(answers[0][1])
        return
    from dopamine_lib.inference.protocols.room import EXCEEDED

    for name, answer in answers:
        likely = "" if answer["probabilities"] is None else f", {100 * max(answer['probabilities']):.1f} %"
        called = "".join(f", {said}" for said, _ in _called(answer))
        print(f"{name}: {answer['grade']}{likely}{called}" + (f"; warning: {EXCEEDED}" if answer["exceeded"] else ""))
    first = answers[0][1]
    amounts = first["bytes"]
    online = (amounts["online_sent"] + amounts["online_received"]) / 1e6
    print(
        f"{len(answers)} answers in {seconds:.1f} s, {60 * len(answers) / seconds:.0f} a minute: "
        f"{first['together']} at once in {first['seconds_online']:.2f} s online ({first['rounds']} rounds), "
        f"each {online:.1f} MB and {first['seconds_offline']:.2f} s ahead"
    )


def _print_one(answer: dict) -> None:
    if answer["probabilities"] is None:
        print(answer["grade"])
    else:
        scored = [*zip(answer["grades"], answer["probabilities"], strict=True)]
        if len(scored) > MOST_SHOWN:
            scored = sorted(scored, key=lambda one: -one[1])[:5]
        for grade, probability in scored:
            print(f"{grade:18} {100 * probability:5.1f} %{'  <' if grade == answer['grade'] else ''}")
    if answer["called"]:
        said = ", ".join(f"{said} (threshold {beyond:.2f})" for said, beyond in _called(answer))
        print(f"severity {answer['severity']:.2f}, of {len(answer['grades']) - 1} at most: {said}")
    if answer["exceeded"]:
        from dopamine_lib.inference.protocols.room import EXCEEDED

        print(f"warning: {EXCEEDED}")
    amounts = answer["bytes"]
    online = (amounts["online_sent"] + amounts["online_received"]) / 1e6
    ahead = [f"{amounts[f'offline_to_{role}'] / 1e6:.1f} MB for the {role}" for role in ("provider", "patient")]
    print(
        f"{answer['seconds_online']:.2f} s online ({online:.1f} MB, {answer['rounds']} rounds), "
        f"{answer['seconds_offline']:.2f} s ahead ({', '.join(ahead)})"
    )


def _called(answer: dict) -> list[tuple[str, float]]:
    """For each disease with a threshold, what the patient's process made of it, and the threshold."""
    return [
        (f"{'' if called else 'not '}{what.replace('_', '-')}", answer["thresholds"][what])
        for what, called in answer["called"].items()
    ]
