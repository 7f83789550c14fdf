"""Rank passages by similarity to a question, with embeddings of the demo model (pip install openai).

usage: search.py [QUESTION]
"""

import sys

from openai import OpenAI

PASSAGES = [
    "The LORD is my shepherd; I shall not want.",
    "Mr. Darcy danced only once with Mrs. Hurst and once with Miss Bingley.",
    "And the waters returned, and covered the chariots, and the horsemen.",
    "Emma Woodhouse, handsome, clever, and rich, with a comfortable home.",
]
client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
question = sys.argv[1] if len(sys.argv) > 1 else "Who danced at the ball?"
vectors = [d.embedding for d in client.embeddings.create(model="demo-embed", input=[question, *PASSAGES]).data]
scores = [sum(a * b for a, b in zip(vectors[0], v)) for v in vectors[1:]]
for score, passage in sorted(zip(scores, PASSAGES), reverse=True):
    print(f"{score:.3f}  {passage}")
