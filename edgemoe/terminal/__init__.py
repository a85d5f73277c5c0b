"""What the commands do between the shell and the engine: prompts, streamed text, progress.

run.py answers one prompt, interactive.py holds a conversation, session.py is what both share;
convert.py watches a conversion, inspect.py describes a store, bench.py is a command with its table,
model_path.py tells a store from what is none. Only cli.py imports this room.
"""
