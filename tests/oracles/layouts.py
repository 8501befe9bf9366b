"""Other libraries' packing orders, code by code and bit by bit, on Python's integers.

Written from their sources' descriptions (docs/layouts.md says which); no code is shared with the library. Each function
takes a matrix of patterns, codes from 0 up, and gives rows of words, not negative.
"""

from __future__ import annotations


def stream(codes, bits, width):
    """Words of ``width`` bits along a row: code i in the bits [i * bits, (i + 1) * bits) of one long integer."""
    rows = []
    for row in codes:
        whole = sum(int(code) << (i * bits) for i, code in enumerate(row))
        count = -(-len(row) * bits // width)
        rows.append([(whole >> (j * width)) % (1 << width) for j in range(count)])
    return rows


def whole_words(codes, bits, width):
    """As many codes in a word as fit; none crosses."""
    fit = width // bits
    rows = []
    for row in codes:
        parts = [row[i : i + fit] for i in range(0, len(row), fit)]
        rows.append([sum(int(code) << (i * bits) for i, code in enumerate(part)) for part in parts])
    return rows


def nibbles(codes, first_is_high):
    """Two codes a byte."""
    rows = []
    for row in codes:
        even = [*row, 0] if len(row) % 2 else row
        pairs = [(int(a), int(b)) for a, b in zip(even[::2], even[1::2], strict=True)]
        rows.append([a * 16 + b if first_is_high else a + b * 16 for a, b in pairs])
    return rows


def awq(codes):
    """Slot i of a word holds column [0, 2, 4, 6, 1, 3, 5, 7][i] of eight."""
    slot_of_column = [0, 4, 1, 5, 2, 6, 3, 7]
    rows = []
    for row in codes:
        words = [0] * (len(row) // 8)
        for column, code in enumerate(row):
            words[column // 8] += int(code) << (4 * slot_of_column[column % 8])
        rows.append(words)
    return rows


def transposed(rows):
    return [list(column) for column in zip(*rows, strict=True)]


def down(function, codes, *how):
    """The same along the columns."""
    return transposed(function(transposed(codes), *how))


def bit_planes(codes, planes):
    """Of each 32 codes: words that hold their lowest bits, then words of the next ones."""
    rows = []
    for row in codes:
        words = []
        for start in range(0, len(row), 32):
            part, shift = row[start : start + 32], 0
            for width in planes:
                fields = [(int(code) >> shift) % (1 << width) for code in part]
                words += stream([fields], width, 32)[0]
                shift += width
        rows.append(words)
    return rows


def parts(codes, bits, width, first_is_high, per_word):
    """Rows of a matrix in equal parts, each in a place of its own in every word; missing rows are 0."""
    count = -(-len(codes) // per_word)
    words = [[0] * len(codes[0]) for _ in range(count)]
    for i, row in enumerate(codes):
        part, at = divmod(i, count)
        place = per_word - 1 - part if first_is_high else part
        for j, code in enumerate(row):
            words[at][j] += int(code) << (place * bits)
    assert all(0 <= word < 1 << width for row in words for word in row)
    return words
