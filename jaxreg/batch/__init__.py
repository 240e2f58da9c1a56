"""Token data: ragged datums become one padded, masked batch of arrays, which knows how to be reduced.

Imports ``base``. Read first: `token_batch.py`.
"""

from jaxreg.batch.token_batch import TokenBatch as TokenBatch
