"""Tokenizers: whether two read text alike (``compare``), which token of one is which of the other (``mapping``)."""
