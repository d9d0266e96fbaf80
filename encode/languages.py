"""Sides, turns and lettering in captions of other languages, as patterns: what they find is never mirrored.

captions.py swaps English sides alone. Stems are searched where a script has no spaces or a language many endings; a word too
many only costs mirror images, a word too few trains wrong captions.
"""

from __future__ import annotations

import re
import unicodedata

# Signs of format (category Cf), which nobody sees.
_UNSEEN = re.compile(
    "[\u00ad\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff\ufff9-\ufffb"
    "\U000110bd\U000110cd\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0001\U000e0020-\U000e007f]"
)
# Signs that hide a word and are seen: tatweel, harakat, niqqud, the stress mark of Russian textbooks.
_HIDING = re.compile("[\u0640\u064b-\u0652\u0591-\u05bd\u05bf-\u05c7]|(?<=[\u0400-\u04ff])\u0301")

_STEMS = re.compile(
    "左|右|ひだり|みぎ|ヒダリ|ミギ|왼|오른|좌측|우측|좌우|바른쪽|"
    "лев|лів|ляв|прав|десн|дясн|сол жақ|оң жақ|αριστερ|δεξ|"
    "يسار|يسرى|[أا]يسر|يمين|يمنى|[أا]يمن|چپ|راست|بائیں|دائیں|بایاں|دایاں|שמאל|ימין|ימנ|"
    "बाए|बाई|बाय|बांए|दाए|दाई|दाय|डाव|उजव|वाम|বাম|ডান|বাঁ|இடது|வலது|ఎడమ|కుడి|ડાબ|જમણ|ਖੱਬ|ਸੱਜ|"
    "ซ้าย|ขวา|ឆ្វេង|ស្តាំ|ဘယ်|ညာ|მარცხ|მარჯვ|ձախ|աջ|ግራ|ቀኝ|"
    # Turns, signs that say something, maps.
    "часовой стрел|надпис|вывеск|時計回り|反時計|顺时针|逆时针|順時針|逆時針|写着|寫著|写有|寫有|書かれ|書いて|文字|"
    "مكتوب|쓰여|쓰인|적혀|적힌",
    re.IGNORECASE,
)
_CZECH = "á|é|ý|ou|o|a|e|ej|oj|om|im|ih|ém|ého|ému|ým|ými|ých|u"  # endings of Slavic adjectives
_POLISH = "a|ą|e|y|ej|ego|emu|ym|ymi|ych|o"
_WORDS = re.compile(
    r"\b(?:"
    # German, Dutch, Afrikaans; "links" of a chain or a golf course is below.
    r"\w*(?:links(?:seit|auß|auss|händ|kurv|oben|unten|hint|vorn|steh|rum|her|gericht|boven|onder|acht|voor|af|om|e\b)|rechts)\w*|"
    r"(?:halb|ganz|weit|oben|unten)links|linke[mnrs]?|rechte[mnrs]?|regs|regter\w*|"
    # French, Spanish, Catalan, Portuguese, Galician, Italian, Romanian
    r"gauch[eè]\w*|droit\w*|izquierd\w+|derech[ao]\w*|izda?|izq|dch?a|zurd[oa]s?|esquerr\w*|dret[as]?|esquerd\w+|direit\w+|dereit\w+|"
    r"canhot\w+|sinistr[aeio]|destr[aeio]|mancin[aeio]|st[âaîi]ng(?:a|ă|ul|ului|ii|i)?|dreapt\w*|drept\w*|"
    # Swedish, Norwegian, Danish, Icelandic, Finnish, Estonian, Latvian, Lithuanian
    r"vänst\w*|höger\w*|högra|venstr\w*|høyre\w*|højre\w*|vinstr[ai]\w*|hægr[ai]\w*|vasem\w*|vasen|oike[ai]\w*|vasak\w*|parem\w*|"
    rf"kreis(?:ā|aj|i\b)\w*|lab(?:ā|aj)\w*|pa labi|kair(?:ė|ę|ia|io)\w*|dešin\w+|"
    # Polish; Czech and Slovak; Serbian, Croatian, Slovenian, Bulgarian
    rf"lew(?:{_POLISH})|praw(?:{_POLISH})|(?:lewo|prawo)ręczn\w+|na(?:lewo|prawo)|(?:v|z|na|do|u)?l[eě]v(?:{_CZECH})|(?:v|z|s|na|do|u)?prav(?:{_CZECH})|"
    rf"(?:v|z|na|do)?ľav(?:{_CZECH})|(?:u|na)?lijev\w+|(?:na|z|u)?desn\w+|"
    # Turkish, Hungarian, Albanian, Basque
    r"sağ\w*|sol(?:da|un|u\b|dan)\w*|sola? (?:taraf|yan|üst|alt|köşe|el|kol|göz|doğru|bak|dön)\w*|"
    r"bal(?:ra|ról|oldal\w*| oldal\w*| kéz\w*)|"
    r"jobb\w*|majtas|djathtas|ezker\w*|eskui\w*|"
    # Vietnamese, Indonesian, Malay, Tagalog, Swahili, Uzbek
    r"trái|phải|kiri|kirinya|kanan|kanannya|kaliwa\w*|kushoto|kulia|chapda|"
    # Turns, lettering, maps
    r"uhrzeiger\w*|steuerbord\w*|backbord\w*|tribord|b[âa]bord|estribor\w*|babor|boreste|bombordo|horaire|antihorari\w*|aufschrift\w*|"
    r"(?:wort|mot|palabra|palavra|parola|woord) (?-i:[A-ZÄÖÜÉÀ]{2,})|beschrift\w*|schriftzug|inschrift\w*|"
    r"inscri(?:ption|pci|pç)\w*|iscrizion\w*|opschrift\w*|landkarte\w*|napis\w*"
    r")\b",
    re.IGNORECASE,
)
_LINKS = re.compile(r"\blinks\b", re.IGNORECASE)
_THINGS = re.compile(r"\b(?:golf|course|chain|chains|fence|cuff|sausage|sausages)\b", re.IGNORECASE)
_ENGLISH = re.compile(r"\b(?:the|a|at|on|with|and|his|are)\b", re.IGNORECASE)
_GERMANIC = re.compile(  # words of captions in which "links" is a side, whatever else is in them
    r"\b(?:der|das|dem|des|ein|eine|einem|einen|einer|im|auf|und|mit|ist|sind|vom|neben|zur|zum|het|een|op|zit|staat|ligt|naast|en)\b",
    re.IGNORECASE,
)


def plain(caption: str) -> str:
    """A caption without wide letters and invisible signs."""
    return _UNSEEN.sub("", unicodedata.normalize("NFKC", caption))


def found(caption: str) -> str | None:
    """The first word of a caption that tells of sides, turns or lettering in another language; None where there is none."""
    if not caption.isascii():
        caption = _HIDING.sub("", unicodedata.normalize("NFD", plain(caption)))
        caption = unicodedata.normalize("NFC", caption)
    for pattern in (_STEMS, _WORDS):
        if match := pattern.search(caption):
            return match.group()
    match = _LINKS.search(caption)
    if match is None or _THINGS.search(caption) or (_ENGLISH.search(caption) and not _GERMANIC.search(caption)):
        return None
    return match.group()
