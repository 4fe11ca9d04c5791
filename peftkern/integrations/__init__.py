"""Drop-ins for other libraries. Importing this package imports none of them."""
