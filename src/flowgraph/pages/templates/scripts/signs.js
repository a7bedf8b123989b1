// Make invisible characters visible.
//
// Control and format characters, surrogates, private-use characters, and line and paragraph separators have no glyph of
// their own, and some of them reorder the text around them. A page shows a sign instead of each. The module signs.py
// applies the same rules in Python; a test compares the two.

const HIDDEN_CHARACTERS = /[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Zl}\p{Zp}]/gu;
const FIRST_CONTROL_PICTURE = 0x2400; // U+2400 is the picture of U+0000, and so on up to U+001F
const DELETE = 0x7f;

function isJoiner(character) {
  return character === "\u200c" || character === "\u200d";
}

function signOf(character) {
  if (character === "\n") return "⏎";
  if (character === "\t") return "⇥";
  const code = character.codePointAt(0);
  if (code < 0x20) return String.fromCodePoint(FIRST_CONTROL_PICTURE + code);
  if (code === DELETE) return "␡";
  return `⟨U+${code.toString(16).toUpperCase().padStart(4, "0")}⟩`;
}

/** Text in which each invisible character is replaced by its sign. */
function visible(text) {
  return text.replace(HIDDEN_CHARACTERS, (character) => {
    // A joiner inside a word or an emoji changes the shape of its neighbours; only a joiner on its own is invisible.
    const shapesNeighbours = isJoiner(character) && text !== character;
    return shapesNeighbours ? character : signOf(character);
  });
}

/** Visible text whose leading and trailing spaces are signs too; empty text is named. */
function exact(text) {
  if (text === "") return "(empty)";
  return visible(text).replace(/^ +| +$/g, (spaces) => "␣".repeat(spaces.length));
}
