"""fastpg in other libraries. Each module is named after the library it imports; nothing else in fastpg imports that library."""
