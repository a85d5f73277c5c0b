"""What the commands do between the shell and the engine: prompts, streamed text, progress.

run.py answers one prompt, interactive.py holds a conversation, convert.py watches a conversion,
model_path.py tells a store from what is none. cli.py and inspect_store.py alone import this room.
"""

from __future__ import annotations
