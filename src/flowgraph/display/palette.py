"""Colours with one meaning each, for pages, notebooks, figures and the terminal.

The hues are those of Okabe and Ito, "Color Universal Design: how to make figures and presentations that are friendly
to colorblind people" (2002, revised 2008): blue, bluish green, vermillion, reddish purple and yellow. Their lightness
is adapted to the ground, so that words in these colours have a contrast of at least 4.5 to 1 with a page. ``context``
and ``found`` are colours of lines and bars, never of words. No meaning depends on colour alone: regions also differ
by their lines, differences by bars, and amounts by lightness.
"""

from __future__ import annotations

from dataclasses import dataclass

LIGHT_GROUND = ("#fbfbf9", "#ffffff")
"""Background of the pages and of their cards in the light theme."""
DARK_GROUND = ("#16171b", "#1e2026")
"""Background of the pages and of their cards in the dark theme."""


@dataclass(frozen=True)
class Colour:
    """The two colours of one meaning, as ``#rrggbb``.

    Attributes:
        light: on a light background.
        dark: on a dark background.
    """

    light: str
    dark: str


PALETTE = {
    # Regions. Blue also marks what comes from the question's side (g, flow in), green what goes to the answer's side
    # (h, flow out).
    "question": Colour("#0072b2", "#56b4e9"),
    "reasoning": Colour("#4a4d55", "#c9ccd4"),
    "answer": Colour("#007a58", "#46b68c"),
    "context": Colour("#8a8d96", "#7b7f8b"),
    # Amounts. Flow is vermillion everywhere; in a difference, vermillion is more flow and purple less.
    "flow": Colour("#b74d02", "#fe8444"),
    "less": Colour("#a64e81", "#e588bc"),
    # Matches of a search, always with a line in the text's colour around.
    "found": Colour("#f0e442", "#f0e442"),
}

FLOW_RAMP_ON_DARK = ("#2e1d15", "#562f14", "#7f4401", "#a16004", "#c47e00", "#e29f1e")
"""Amounts of flow on a dark terminal, from low to high; text is white on the first four steps, then black."""
FIRST_STEP_WITH_BLACK_INK = 4


def css_variables() -> str:
    """Write the palette and the backgrounds as CSS variables, ``--question`` and so on, for the current theme.

    Browsers without ``light-dark()`` get the light theme.
    """
    colours = {
        "page": Colour(LIGHT_GROUND[0], DARK_GROUND[0]),
        "card": Colour(LIGHT_GROUND[1], DARK_GROUND[1]),
        **PALETTE,
    }
    both = "".join(f"  --{name}: light-dark({colour.light}, {colour.dark});\n" for name, colour in colours.items())
    light = "".join(f"    --{name}: {colour.light};\n" for name, colour in colours.items())
    fallback = f"@supports not (color: light-dark(#000, #fff)) {{\n  :root {{\n{light}  }}\n}}\n"
    return f":root {{\n{both}}}\n{fallback}"


def channels(colour: str) -> tuple[int, int, int]:
    """Read a colour ``#rrggbb`` as red, green and blue from 0 to 255."""
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def rgba(colour: str, opacity: float) -> str:
    """Write a colour ``#rrggbb`` with an opacity as CSS."""
    red, green, blue = channels(colour)
    return f"rgba({red},{green},{blue},{opacity:.3g})"
