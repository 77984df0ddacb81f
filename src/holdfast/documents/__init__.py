"""The documents' surface: their class and adapter names over the store, and a user's own storage class."""
