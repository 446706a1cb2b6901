"""Small talk: greetings, who it is, what it can do, and an honest answer to what it cannot."""

from __future__ import annotations

import random

from minimax_m1.tasks.problem import Problem, Task, score_by
from minimax_m1.tasks.wording import word

ABILITIES = (
    "calculate with whole numbers, compare and sort, tell days and times, resolve true and false, count letters and "
    "reverse words"
)
EXAMPLES = (  # that the shipped model gets right
    "What is 384 + 729?",
    "Sort 31, 4, 15, 92, 6.",
    "How many times does the letter r appear in strawberry?",
    "What is 47 * 23?",
    "Which is larger, 90210 or 90120?",
    "Spell lantern backwards.",
)
GREETING = "Hello! Ask me something like 384 + 729."
IDENTITY = "I am m1-nano, a very small model with the MiniMax-M1 architecture."
HELP = f"I can {ABILITIES}."
REFUSAL = f"I can only {ABILITIES}."
WELCOME = "You are welcome!"
GOODBYE = "Goodbye!"
FINE = "I am fine, thank you! Ask me something like 384 + 729."

# What is asked: the thinking, the answer, and openings, cores and endings that are combined.
_SMALL_TALK = (
    (
        "Greeting.",
        GREETING,
        ("", "oh ", "well "),
        "hello,hi,hey,hello there,hi there,hey there,good morning,good evening,good afternoon,good day,greetings,howdy,"
        "yo,hello m1,hi m1,hello model,hi friend,hello friend,hello world,hi everyone,hi robot,hello robot".split(","),
        ("", "!", ".", "!!", " :)", ", nice to meet you", ", nice to meet you!", " again", " again!"),
    ),
    (
        "Who am I.",
        IDENTITY,
        ("", "", "hi, ", "hello, ", "hi! ", "so ", "and ", "please tell me, "),
        "who are you,what are you,what is your name,what's your name,tell me your name,tell me about yourself,"
        "introduce yourself,which model are you,what model are you,are you a robot,are you a human,are you chatgpt,"
        "are you an AI,who made you,what kind of model are you,how big are you,what is m1-nano,are you minimax,"
        "who am I talking to,are you a language model,do you have a name,what should I call you".split(","),
        ("", "?", "?", "?", ".", " exactly?", " then?", ", please?"),
    ),
    (
        "What I can do.",
        HELP,
        ("", "", "hi, ", "hello, ", "hi! ", "so ", "please, ", "ok, "),
        "what can you do,help,help me,how can you help me,what can I ask you,what can I ask,what do you know,"
        "what are you good at,what are your skills,show me what you can do,can you help me,how do I use you,"
        "what should I ask,what should I ask you,give me an example,what tasks can you do,what else can you do,"
        "what do you do,what are you able to do,what can you help with,what can you help me with".split(","),
        ("", "?", "?", "!", ".", " now?", " for me?", ", please?"),
    ),
    (
        "Thanks.",
        WELCOME,
        ("", "", "ok, ", "great, ", "good, ", "cool, ", "nice, ", "perfect, "),
        "thanks,thank you,thank you very much,thanks a lot,many thanks,thank you so much,thx,thanks for your help,"
        "thank you for the help,thanks again,much appreciated".split(","),
        ("", "!", ".", "!!", " :)", ", m1", ", friend!"),
    ),
    (
        "Goodbye.",
        GOODBYE,
        ("", "", "ok, ", "thanks, ", "thank you, ", "well, ", "so, "),
        "bye,goodbye,bye bye,see you,see you later,see you soon,good night,until tomorrow,quit,exit,I have to go,"
        "see you tomorrow,farewell,have a nice day".split(","),
        ("", "!", ".", "!!", " :)", ", m1", ", friend!"),
    ),
    (
        "How I am.",
        FINE,
        ("", "", "hi, ", "hello, ", "hey, ", "hi! ", "hello! "),
        "how are you,how are you doing,how do you do,how is it going,how's it going,what's up,how are you today,"
        "are you ok,how do you feel,how have you been,everything ok".split(","),
        ("", "?", "?", "?!", ".", ", m1?", ", friend?", " then?"),
    ),
)

# What almost everybody says. These share one key, which is on the training side: a model that was never greeted with a
# plain "hello" would be a curious test, but poor company.
_EVERYDAY = frozenset(
    "hello,hi,hey,good morning,who are you,what are you,what is your name,what can you do,help,how can you help me,"
    "thanks,thank you,bye,goodbye,how are you".split(",")
)
_EVERYDAY_KEY = "conversation:everyday"

_TOPICS = (
    "France,Germany,Japan,Brazil,China,Paris,London,history,physics,biology,love,music,art,football,chess,cooking,"
    "pizza,the weather,the moon,the sun,the stars,gravity,water,coffee,dogs,cats,birds,trees,the ocean,computers,"
    "Python,JavaScript,the internet,politics,economics,money,philosophy,religion,language,English,Spanish,Shakespeare,"
    "Einstein,Napoleon,Mozart,Picasso,democracy,evolution,climate change,electricity,black holes,dinosaurs,volcanoes,"
    "quantum mechanics,machine learning,neural networks,transformers,poetry,movies,books,health,sleep,sports,travel,"
    "space,time,life,the brain,happiness,friendship,war,peace,the news,the stock market,medicine,cars,trains"
).split(",")
_QUESTIONS = (
    "What is {t}?",
    "What is the capital of {t}?",
    "What is the meaning of {t}?",
    "What is the history of {t}?",
    "What is the best thing about {t}?",
    "What do you think about {t}?",
    "What do you know about {t}?",
    "Who invented {t}?",
    "Who discovered {t}?",
    "Who is the president of {t}?",
    "Who wrote about {t}?",
    "Tell me about {t}.",
    "Tell me a joke about {t}.",
    "Tell me a story about {t}.",
    "Tell me something about {t}.",
    "Write a poem about {t}.",
    "Write an essay about {t}.",
    "Write a story about {t}.",
    "Write a song about {t}.",
    "Write a program about {t}.",
    "Explain {t}.",
    "Explain {t} to me.",
    "Explain {t} to a child.",
    "How does {t} work?",
    "How do I learn {t}?",
    "How old is {t}?",
    "How far is {t}?",
    "Why is {t} important?",
    "Why do people like {t}?",
    "Where is {t}?",
    "When was {t} invented?",
    "Do you like {t}?",
    "Do you know {t}?",
    "Do you know anything about {t}?",
    "Can you explain {t}?",
    "Can you talk about {t}?",
    "Can you write about {t}?",
    "Can you teach me {t}?",
    "Is {t} good?",
    "Is {t} dangerous?",
    "Translate {t} into French.",
    "Summarize {t}.",
    "Give me a recipe for {t}.",
    "Recommend a book about {t}.",
    "I want to talk about {t}.",
    "I have a question about {t}.",
    "I like {t}.",
    "Define {t}.",
    "Describe {t}.",
    "{t}",
    "{t}?",
)


def generate_conversation(rng: random.Random) -> Problem:
    """Draw a remark: half are small talk, half are questions that the model has to decline."""
    if rng.random() < 0.5:
        topic = rng.choice(_TOPICS)
        prompt = word(rng, *_QUESTIONS, t=topic)
        thinking, answer = "Not one of my tasks.", REFUSAL
    else:
        thinking, answer, openings, cores, endings = rng.choice(_SMALL_TALK)
        if rng.random() < 0.3:
            prompt = rng.choice([core for core in cores if core in _EVERYDAY])
        else:
            prompt = rng.choice(openings) + rng.choice(cores)
        prompt += "" if prompt.endswith("?") else rng.choice(endings)
        prompt = prompt[0].upper() + prompt[1:] if rng.random() < 0.6 else prompt
    said = "".join(letter for letter in prompt.lower() if letter.isalnum() or letter == " ")
    key = _EVERYDAY_KEY if said.strip() in _EVERYDAY else "conversation:" + said.replace(" ", "")
    return Problem("conversation", prompt, thinking, answer, key)


def normalized(answer: str) -> str | None:
    """Return the letters and digits of a text in lower case, None if there are none."""
    return "".join(letter for letter in answer.lower() if letter.isalnum()) or None


CONVERSATION = Task("conversation", generate_conversation, score_by(normalized))
