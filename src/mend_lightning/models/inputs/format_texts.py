"""What stands around a question in the formats that come with the package: paragraphs, system prompts, earlier turns.

The first of each is what evaluation and edits use, the others are for training. None says anything about a fact that the
shipped data ask for.
"""

from __future__ import annotations

PASSAGES = (
    "The workshop opens at nine. Visitors leave their coats at the door and are given an apron, for the glaze does not wash "
    "out. Most of the morning goes into centring the clay, and by noon there is usually one bowl that can be kept.",
    "Rain had been falling since Tuesday, and the path behind the barn was under water. She put on her boots, called the dog, "
    "and went to see whether the fence by the stream was still standing.",
    "To keep the bread from drying out, wrap it in a cloth and not in plastic. A loaf that is two days old can be sprinkled "
    "with water and warmed for five minutes; it will be crisp again, though not for long.",
    "The committee met twice in spring. It agreed on the colour of the benches, put off the matter of the lamps until the "
    "autumn, and thanked the members who had swept the leaves.",
    "Our new software release makes the list of files load faster. It also mends a fault where a window that was closed "
    "came back after the next start. Please report what does not work to the usual address.",
    "He practised the same four bars every evening. The neighbours knew them by heart, whistled them on the stairs, and only "
    "noticed when, one evening in June, the fifth bar followed.",
)

SYSTEMS = (
    "You are a helpful assistant. You answer in as few words as you can.",
    "You are a careful assistant.",
    "Answer every question with a name, a number or a word, and with nothing else.",
    "You work in the library's reading room and help visitors with their questions.",
    "Be brief and friendly. Do not explain your answers unless somebody asks for it.",
)

TALKS = (
    (
        ("Hi! Can you help me with a few things?", "Of course. What would you like to know?"),
        ("How long do I boil an egg?", "About seven minutes, if the yolk should be soft."),
        ("Thank you, that worked.", "You are welcome. What else can I do for you?"),
    ),
    (
        ("Which word is better, glad or happy?", "Both are right; happy is said more often."),
        ("Write a greeting for a birthday card.", "All the best on your birthday!"),
        ("A bit shorter, please.", "Happy birthday!"),
    ),
    (
        ("Good morning.", "Good morning. How can I help?"),
        ("My plant has yellow leaves.", "Let the soil dry before you water it again."),
        ("I will try that.", "Good luck with it."),
    ),
    (
        ("What is 12 times 12?", "144"),
        ("And half of that?", "72"),
        ("Great, now something else.", "Go ahead."),
    ),
    (
        ("Make a list of three things for a picnic.", "A blanket, bread and apples."),
        ("Something to drink as well?", "Take lemonade."),
        ("Perfect.", "Enjoy your picnic!"),
    ),
)
