"""Whether two tokenizers read text alike, and which token of one is which of the other."""
