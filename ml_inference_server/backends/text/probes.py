"""Texts that tokenizers treat differently; what reads text is tried on them."""

# Case, accents, scripts, blanks, emoji, literal special tokens, one token, many.
PROBES = (
    "the quick brown fox jumps over the lazy dog",
    "x",
    "  leading, trailing\tand\ndouble  blanks \n",
    "UPPER Case ÀÉÎ naïve café ǅ İstanbul straße ΟΔΟΣ 東京は日本の首都です。 привет مرحبا",
    "🙂 👩‍👩‍👧 e\u0301 \u200b\u00ad ﬁ ½ null\x00byte \x07bell \ufeffbom nbsp\u00a0thin\u2009line\u2028sep",
    "a</s>b [SEP] <pad> <|endoftext|> [MASK] <mask> <s> [CLS]",
    "a passage of some length, as they are found in collections of web pages; " * 3,
    "supercalifragilisticexpialidocious" * 4 + " ...!? 1 2 3 4.5 6,789",
)
