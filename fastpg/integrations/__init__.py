"""fastpg in other libraries: each module here is named after the library it imports, and nothing else in fastpg imports it."""
