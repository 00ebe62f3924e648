"""Short texts on which tokenizers of different make tend to differ; a few dozen, in many scripts."""

from __future__ import annotations

import random

WRITTEN = (
    "The film was great.",
    "It's what they'd've said: we're, I'll, can't, O'Neill's.",
    "ALL CAPS, lower case, camelCase, snake_case, kebab-case, Title Case",
    "Ünïcödé: façade, naïve, Ångström, Łódź, żółć, crème brûlée",
    "Straße, ẞ, ﬁ, ﬂ, ½, ², ™, №, Ⅷ, ㎏, ｆｕｌｌｗｉｄｔｈ",
    "Le chat mange la souris\u00a0; n'est-ce pas\u202f? «\u00a0Oui\u00a0»",
    "Die Würde des Menschen ist unantastbar.",
    "El niño comió una piñata. ¿Qué? ¡Olé!",
    "Съешь же ещё этих мягких французских булок",
    "Η γρήγορη αλεπού πηδάει πάνω από τον σκύλο",
    "שלום עולם, מה שלומך?",
    "مرحبا بالعالم، كيف حالك؟",
    "नमस्ते दुनिया, आप कैसे हैं?",
    "สวัสดีชาวโลก วันนี้อากาศดี",
    "你好，世界。今天天气很好！",
    "こんにちは世界。カタカナとｶﾀｶﾅ。",
    "안녕하세요 세계, 오늘 날씨가 좋네요",
    "Xin chào thế giới, tiếng Việt",
    "Merhaba dünya, İstanbul ve ırmak",
    "გამარჯობა მსოფლიო, բարեւ աշխարհ, ሰላም ልዑል",
    "def f(x):\n    return [i ** 2 for i in range(x) if i % 3 != 0]\n",
    "int main(void) {\n\tprintf(\"%d\\n\", 0xFF & ~mask);\n\treturn 0;\n}",
    "<div class='a'>&nbsp;</div><!-- note --> {\"key\": [1, null, -2.5e-3]}",
    "SELECT * FROM t WHERE a >= 'x' AND b <> NULL; -- done",
    "https://www.example.org/path?q=1&r=%20#top user@example.org C:\\Dir\\file.txt",
    "$x^2 + \\frac{1}{2} \\leq \\sum_{i=0}^{n} \\alpha_i$ ∀∃∈ℝ ≤≥≠±×÷√∞",
    "0 1 12 123 1234 12345 1234567890 3.14159 1,000,000 1e-10 007 ٣٤٥ ४५६",
    "2024-02-29T23:59:59Z, 10:30 a.m., $5.99, 100%, +49 (0)30 1234-567",
    "🎬👍🏽👩‍👩‍👧‍👦🇪🇺❤️‍🔥☺︎☺️🫠",
    "e\u0301 o\u0308 A\u030a n\u0303 \u1112\u1161\u11ab Z\u0351\u036b\u0343",  # decomposed: NFC would join them
    "zero\u200bwidth\u200cnon\u200djoiner\u2060word\ufeffbom soft\u00adhyphen \u200eltr\u200frtl \u202eoverride\u202c",
    "\x00\x01\x07\x08\x0b\x0c\x1b[31m\x7f\x85\x9f",
    "\t\ttabs\t \tmixed\r\nCRLF\rCR\n\n\n\nlines\u2028separator\u2029end",
    " leading", "  two leading", "trailing ", "trailing  ", "\n", " ", "   ", "\t",
    "in  the   middle    of     the      words\u3000ideographic\u2003em",
    "…—–‐‑‒―‘’‚“”„†‡•‰′″‹›⁄€₹₿",
    "aaaaaaaaaaaaaaaaaaaaaaaa!!!!!!!!!!!!???????-------======______......",
    "\ue000\uf8ff\U000f0000\u0378\ufffd\uffff",  # private, unassigned, replacement, no character
    "user: hi\nassistant: hello</s><s>[INST] x [/INST] <|im_start|>user\n<bos><eos><pad><unk>[CLS][SEP][MASK]",
)  # fmt: skip


def probes() -> list[str]:
    """The written texts, all of ASCII, and 24 strings of random characters of the first 64 Ki, the same each time."""
    rng = random.Random(0)
    codes = [code for code in range(0xFFFE) if not 0xD800 <= code <= 0xDFFF]
    drawn = ["".join(chr(rng.choice(codes)) for _ in range(40)) for _ in range(24)]
    return [*WRITTEN, "".join(map(chr, range(128))), *drawn]
