"""What a score's attention, prefixes and gradients say of each token, read from a model's own forward.

Knows torch and transformers, not OpenRLHF. The way in is ``attach`` for one attention row, and
``evidence_readers.attach_readers`` for what credit methods need. In reading order:

full_matrix.py          the definition: the row read off an eager forward's full matrix; modules outside the interface
query_positions.py      which row: the token that the score head reads
attention_row.py        the maths of one row, and of the mean of several
layers.py               which layer of which model; scalar_head.py loads a reward model without OpenRLHF
model_files.py          whether a model's files are the model that will run, before it is loaded
query_key_tap.py        where the row is taken: transformers' table of attention functions
row_reader.py           what one forward showed, and every reason to refuse it
packed_sequences.py     sequences joined into one stream
process_groups.py       a sequence split over a ring, heads split over processes
evidence_readers.py     what methods need, by name; the score of every prefix, gradient x input
signed_contribution.py  what each token adds to the score through the last layer's attention

Dimensions: B responses in a batch, S tokens of a padded sequence, H query heads, K key heads (H / K query heads share
one), D width of a head; R rows of several; T tokens of a packed stream, L of them on this process.
"""

from abc_plugin.attention.attach import attach

__all__ = ["attach"]
