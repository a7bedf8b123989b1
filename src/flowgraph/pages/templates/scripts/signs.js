// Characters that would be invisible, or would reorder what stands around them, are shown as signs.
const HIDDEN = /[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Zl}\p{Zp}]/gu;
const JOINERS = /^[\u200c\u200d]$/; // needed inside words and emoji, invisible only on their own
function sign(character) {
  const code = character.codePointAt(0);
  if (character === "\n") return "⏎";
  if (character === "\t") return "⇥";
  if (code < 0x20) return String.fromCodePoint(0x2400 + code);
  return code === 0x7f ? "␡" : `⟨U+${code.toString(16).toUpperCase().padStart(4, "0")}⟩`;
}
const visible = (text) => text.replace(HIDDEN, (character) => (JOINERS.test(character) && text !== character ? character : sign(character)));
const exact = (text) => (text === "" ? "(empty)" : visible(text).replace(/^ +| +$/g, (spaces) => "·".repeat(spaces.length)));
