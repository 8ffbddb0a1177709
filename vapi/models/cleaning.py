"""Captions of the web as LlamaGen's T5 was given them, in training and in sampling: without addresses, tags, file names, serial numbers.

The rules, their order and their oddities are DeepFloyd IF's, which PixArt and LlamaGen took over, written anew as a table; what
comes out is theirs to the letter (compared on 60,000 random captions), for other letters would be other features. Two libraries
are part of that: ftfy, which mends broken encodings, and Beautiful Soup, which takes tags away.
"""

from __future__ import annotations

import functools
import html
import re
import urllib.parse
import warnings
from collections.abc import Sequence

NEEDED = "a T5 reads captions that were cleaned as LlamaGen cleans them, and that needs {}: pip install 'vapi-align[t2i]'"

Rules = Sequence[tuple[re.Pattern[str], str]]


def _rules(*pairs: tuple[str, str]) -> Rules:
    return [(re.compile(pattern), replacement) for pattern, replacement in pairs]


def _address(start: str) -> str:
    """A word that begins like a web address, or looks like the name of a site."""
    return rf"\b(?:{start}:(?:/{{1,3}}|[a-zA-Z0-9%])|[a-zA-Z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@))"


DASHES = "\\-\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d"
FILES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"

ADDRESSES = _rules(("<person>", "person"), (_address("https?"), ""), (_address("www"), ""))
SIGNS = _rules(
    (r"@\w+\b", ""),
    ("[\u31c0-\u4dbf\u4e00-\u9fff]+", ""),  # Chinese, and the Japanese signs beside it
    (f"[{DASHES}]+", "-"),
    ("[`´«»“”¨]", '"'),
    ("[‘’]", "'"),
    ("&quot;?", ""),
    ("&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # an address on the internet
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.(?:{FILES})", ""),
    ("[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~)(\]\[}{|\\/*]+", " "),
    (r"\s+\.\s+", " "),
)
JOINED = re.compile("[-_]")  # more than three of them stand for spaces: this-is-my-cute-cat
NUMBERS = _rules(
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    (r"(worldwide\s+)?(free\s+)?shipping", ""),
    (r"(free\s)?download(\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{FILES})(\simage[s]?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    (r"\b\d+\.?\d*[x\u0445×]\d+\.?\d*\b", ""),  # by Latin and by Cyrillic letters
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)


@functools.lru_cache(maxsize=2**16)  # it is asked for a caption's length, and then for its features
def clean(caption: str) -> str:
    """What the encoder reads; perhaps nothing. Cleaned twice, as it is upstream: one pass may leave work for another."""
    return _pass(_pass(caption))


def _pass(caption: str) -> str:
    text = _apply(ADDRESSES, urllib.parse.unquote_plus(caption).strip().lower())
    text = _apply(SIGNS, _without_tags(text))
    if len(JOINED.findall(text)) > 3:
        text = JOINED.sub(" ", text)
    return _apply(NUMBERS, _mended(text)).strip()


def _apply(rules: Rules, text: str) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


def _without_tags(text: str) -> str:
    if "<" not in text and "&" not in text:  # it would come back as it is
        return text
    try:
        import bs4
    except ImportError:
        raise ValueError(NEEDED.format("beautifulsoup4")) from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bs4.MarkupResemblesLocatorWarning)
        return str(bs4.BeautifulSoup(text, features="html.parser").text)


def _mended(text: str) -> str:
    try:
        import ftfy
    except ImportError:
        raise ValueError(NEEDED.format("ftfy")) from None
    return html.unescape(html.unescape(ftfy.fix_text(text))).strip()
