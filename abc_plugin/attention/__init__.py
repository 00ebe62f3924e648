"""What a score's attention, prefixes and gradients say of each token, read from a model's own forward.

Knows torch and transformers, not OpenRLHF. The way in is ``attach`` for one attention row, ``readers.attach_readers``
for what credit methods need. In reading order:

``matrix``      the definition: the row read off the full matrix of an eager forward; modules outside the interface
``positions``   which row: the token that the score head reads
``row``         the maths of one row, and of the mean of several
``layers``      which layer of which model; ``scalar_head`` loads a reward model without OpenRLHF
``model_files`` whether a model's files are the model that will run, before it is loaded
``tap``         where the row is taken: transformers' table of attention functions
``recording``   what one forward showed, and every reason to refuse it
``packed``, ``parallel``  sequences joined into one stream, split over a ring; heads split over processes
``readers``     what methods need, by name; the score of every prefix, gradient x input
``contribution``  what each token adds to the score through the last layer's attention

Dimensions: B responses in a batch, S tokens of a padded sequence, H query heads, K key heads (H / K query heads share
one), D width of a head; in ``row`` R rows; in ``packed`` T tokens of the stream, L of them on this process.
"""

from abc_plugin.attention.attach import attach

__all__ = ["attach"]
