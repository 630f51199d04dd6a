"""Scheduling core: decides what runs next and owns the block tables. No torch, no aiohttp."""
