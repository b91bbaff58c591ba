"""The instructions that reference passes give a model, word for word.

They have a module of their own because pocket is trained on the same words.
"""

REPEAT = "Repeat the previous context."
REPEAT_FROM = "Repeat the part of the previous context that begins with: {start}"
ASK = "Ask a question about the context."
ASK_FROM = (
    "Ask a question about the part of the previous context that begins with: {start}\n"
    "Write the question only."
)
