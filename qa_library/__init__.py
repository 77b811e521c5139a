"""Attribute questions as data: template sets, coded concepts, and the question table built from labelled regions.

library = load_library()
table = build_questions(images, seed=7, library=library)
lint(library)                                   # [] when all is well
"""

from qa_library.ask import question_about, question_of_text
from qa_library.build import QuestionTable, Settings, build_questions, questions_of_image
from qa_library.lint import lint
from qa_library.loader import Code, Library, load_concepts, load_library, read_template_set
from qa_library.questions import QUESTION_SCHEMA, Option, Question, from_table, to_json, to_table
from qa_library.schema import Attribute, TemplateSet, Value

__all__ = [
    "QUESTION_SCHEMA",
    "Attribute",
    "Code",
    "Library",
    "Option",
    "Question",
    "QuestionTable",
    "Settings",
    "TemplateSet",
    "Value",
    "build_questions",
    "from_table",
    "lint",
    "load_concepts",
    "load_library",
    "question_about",
    "question_of_text",
    "questions_of_image",
    "read_template_set",
    "to_json",
    "to_table",
]
