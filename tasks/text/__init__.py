"""From rows to text and token ids: merged prompts, chat templates, encoding, turns, over-long rows.

May enter: functions of texts and ids. Product text is data here: copied, never interpreted.
"""
