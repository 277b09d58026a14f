"""What is noted of a row that is trained on, and how a run says it.

Nothing that is noted changes a token: where TRL trains on such a row, so do we, and where TRL would
train on something else, the sentence says so.
"""

BOUNDARY_MOVED = "boundary_moved"
CONTENT_DROPPED = "content_dropped"
DOUBLE_BOS = "double_bos"
DOUBLE_EOS = "double_eos"
EMPTY_PROMPT = "empty_prompt"
EMPTY_RESPONSE = "empty_response"
# Two compared responses differ only in what was cut off: the row has no gradient.
IDENTICAL_AFTER_TRUNCATION = "identical_after_truncation"
NOT_THE_ASSISTANT = "not_the_assistant"
PROMPT_AS_MESSAGE = "prompt_as_message"
PROMPT_REPEATED = "prompt_repeated"
PROMPT_TWICE = "prompt_twice"
# Their advantages are 0: they count in the means of a loss, and in its pull to the reference.
SAME_SCORES = "same_scores"
TOOLS_IGNORED = "tools_ignored"
TRUNCATED = "truncated"
UNREAD_COLUMN = "unread_column"

# In the line that counts the rows.
COUNTED = {
    EMPTY_PROMPT: "with an empty prompt",
    EMPTY_RESPONSE: "with a response that is nothing but its end",
    SAME_SCORES: "whose scores are all equal",
    TRUNCATED: "truncated to max_length",
    IDENTICAL_AFTER_TRUNCATION: "identical once truncated",
}
# A line each: "in 3 of 40 rows ...".
WARNINGS = {
    PROMPT_REPEATED: "the responses begin with the prompt, which is taken once (TRL takes it twice "
    "or stops)",
    PROMPT_TWICE: "the responses begin with the text of the prompt, which is kept twice, as TRL "
    "does: too few rows do so for it to be the layout of the data",
    PROMPT_AS_MESSAGE: "the prompt is text and the responses are messages, so the prompt is read "
    "as a user's message",
    UNREAD_COLUMN: "a column that is not read holds text that is not trained on",
    NOT_THE_ASSISTANT: "a response begins or ends with a message that is not the assistant's, and "
    "is trained on like the rest",
    TOOLS_IGNORED: "the chat template renders nothing of the tools",
    CONTENT_DROPPED: "the chat template drops or rewrites a part of a message (thinking, a name), "
    "so the model is trained without it",
    DOUBLE_BOS: "the tokens begin with BOS twice, as in TRL: once from the text, and once more "
    "from the tokenizer",
    DOUBLE_EOS: "the tokens end with EOS twice, as in TRL: once from the text or the chat "
    "template, and once more after it",
    BOUNDARY_MOVED: "the tokenised prompt is not how prompt and response begin (tokens merge "
    "across the boundary, or the chat template renders a prompt alone differently); the response "
    "starts where they part, so it trains on a context that generation never sees",
}
