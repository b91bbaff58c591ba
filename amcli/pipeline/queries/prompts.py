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
QUOTE_ABOUT = "What does the text say about {words}?"
QUOTE_MORE = "Tell me more about {words}."
QUOTE_WORDS = 'Which sentence contains the words "{words}"?'
QUOTE_BEFORE = 'What comes right before "{start}"?'
