/* Writes one JSON value on standard output, member by member. docs/command.md has the keys. */
#ifndef TOOLS_JSON_H
#define TOOLS_JSON_H

#include <stdbool.h>
#include <stdint.h>

/* Objects and arrays. `key` is NULL inside of an array and for the outermost value. */
void json_open_object(const char *key);
void json_close_object(void);
void json_open_array(const char *key);
void json_close_array(void);

void json_text(const char *key, const char *text); /* NULL becomes null */
void json_integer(const char *key, int64_t number);
void json_number(const char *key, double number); /* with nine digits; null if it is not finite */
void json_bool(const char *key, bool value);

#endif
