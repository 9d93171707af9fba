"""The quickstart's task: a request to a smart home, answered by one JSON call.

    user       Could you dim the bedroom lamp to 30 percent?
    assistant  {"device": "lamp", "room": "bedroom", "action": "set", "value": 30}

A combination of (device, room, action) is either for training or held out, never both, so the
held-out rows ask for things the model has not been shown. Run it to write both files again::

    python -m jlora.assets.quickstart.make_data

The rows depend on nothing but this file: the same bytes on every machine.
"""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

FOLDER = Path(__file__).parent / "data"
TRAIN_ROWS, HELDOUT_ROWS, HELDOUT_COMBINATIONS = 1600, 100, 40

ROOMS = (
    "kitchen", "bedroom", "bathroom", "living room", "dining room", "guest room",
    "office", "hallway", "garage", "attic", "basement", "nursery",
)  # fmt: skip

DEVICE_NAMES = {
    "lamp": ("lamp", "light", "lights"),
    "heater": ("heater", "heating", "radiator"),
    "fan": ("fan", "ventilator"),
    "blinds": ("blinds", "shutters", "shades"),
    "speaker": ("speaker", "music", "radio"),
}
"""What people call each device; the call always has the key."""

SWITCH_ON = (
    "turn on the {room} {name}",
    "switch the {name} in the {room} on",
    "start the {room} {name}",
    "I need the {name} on in the {room}",
)
SWITCH_OFF = (
    "turn off the {room} {name}",
    "switch the {name} in the {room} off",
    "stop the {room} {name}",
    "I don't need the {name} in the {room} any more",
)
TIMER = (
    "leave the {room} {name} on for {value} minutes",
    "run the {name} in the {room} for {value} minutes",
    "{value} minutes of {name} in the {room}",
)

SAYINGS = {
    ("lamp", "on"): SWITCH_ON,
    ("lamp", "off"): SWITCH_OFF,
    ("lamp", "set"): (
        "dim the {room} {name} to {value} percent",
        "set the {name} in the {room} to {value}%",
        "make the {room} {name} {value} percent bright",
    ),
    ("lamp", "timer"): TIMER,
    ("heater", "on"): SWITCH_ON,
    ("heater", "off"): SWITCH_OFF,
    ("heater", "set"): (
        "set the {room} {name} to {value} degrees",
        "heat the {room} to {value} degrees",
        "make it {value} degrees in the {room}",
    ),
    ("heater", "timer"): TIMER,
    ("fan", "on"): SWITCH_ON,
    ("fan", "off"): SWITCH_OFF,
    ("fan", "set"): (
        "set the {room} {name} to speed {value}",
        "run the {name} in the {room} at {value} percent",
    ),
    ("fan", "timer"): TIMER,
    ("blinds", "open"): (
        "open the {room} {name}",
        "pull the {name} in the {room} up",
        "let some daylight into the {room}",
    ),
    ("blinds", "close"): (
        "close the {room} {name}",
        "pull the {name} in the {room} down",
        "keep the sun out of the {room}",
    ),
    ("blinds", "set"): (
        "open the {room} {name} to {value} percent",
        "move the {name} in the {room} to {value}%",
    ),
    ("speaker", "on"): (*SWITCH_ON, "play something in the {room}"),
    ("speaker", "off"): (*SWITCH_OFF, "make the {room} quiet"),
    ("speaker", "set"): (
        "set the {room} {name} to volume {value}",
        "turn the {name} in the {room} to {value} percent",
    ),
    ("speaker", "timer"): TIMER,
}
"""How people ask for each action of each device."""

MANNERS = ("{}", "{}", "Please {}", "{}, please", "Could you {}?", "Can you {}?", "Hey, {}")

# Multiples of five, and few degrees: copying two digits is the hardest part of the task.
VALUES = {"set": range(10, 100, 5), "timer": range(5, 65, 5)}
DEGREES = range(16, 26)


def combinations() -> list[tuple[str, str, str]]:
    """All (device, room, action)."""
    return [(d, r, a) for (d, a), r in itertools.product(SAYINGS, ROOMS)]


def request(rng: random.Random, device: str, room: str, action: str) -> dict:
    """One row in the messages format."""
    values = DEGREES if (device, action) == ("heater", "set") else VALUES.get(action)
    value = rng.choice(values) if values else None
    saying = rng.choice(SAYINGS[device, action])
    text = saying.format(room=room, name=rng.choice(DEVICE_NAMES[device]), value=value)
    if text[0].islower():
        text = rng.choice(MANNERS).format(text)
    text = text[0].upper() + text[1:]
    call = {"device": device, "room": room, "action": action, "value": value}
    turns = (("user", text), ("assistant", json.dumps(call)))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def split(seed: int = 0) -> tuple[list[dict], list[dict]]:
    """(training rows, held-out rows): no combination and no row is in both."""
    rng = random.Random(seed)
    every = combinations()
    held = rng.sample(every, HELDOUT_COMBINATIONS)
    shown = [c for c in every if c not in held]
    return _distinct(rng, shown, TRAIN_ROWS), _distinct(rng, held, HELDOUT_ROWS)


def _distinct(rng: random.Random, choices: list[tuple[str, str, str]], n: int) -> list[dict]:
    """``n`` different rows, the combinations in turn."""
    rows: dict[str, dict] = {}
    for combination in itertools.cycle(choices):
        row = request(rng, *combination)
        rows.setdefault(row["messages"][0]["content"], row)
        if len(rows) == n:
            break
    found = list(rows.values())
    rng.shuffle(found)
    return found


def main() -> None:
    """Writes train.jsonl and heldout.jsonl."""
    FOLDER.mkdir(exist_ok=True)
    for name, rows in zip(("train", "heldout"), split(), strict=True):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (FOLDER / f"{name}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
