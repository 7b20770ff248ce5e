"""What people look at: HTML pages that need nothing but a browser, and tables for the terminal.

Begin with `page`, which every page is made of. May import the ground alone.
"""
