#include "json.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

static int depth;
static bool is_first = true; /* of its object or array */

static void print_string(const char *text)
{
    putchar('"');
    for (; *text; text++) {
        if (*text == '"' || *text == '\\')
            printf("\\%c", *text);
        else if ((unsigned char)*text < 0x20)
            printf("\\u%04x", *text);
        else
            putchar(*text);
    }
    putchar('"');
}

static void begin(const char *key)
{
    if (depth) printf("%s\n%*s", is_first ? "" : ",", 2 * depth, "");
    is_first = false;
    if (!key) return;
    print_string(key);
    fputs(": ", stdout);
}

static void open_value(const char *key, char bracket)
{
    begin(key);
    putchar(bracket);
    depth++;
    is_first = true;
}

static void close_value(char bracket)
{
    depth--;
    if (!is_first) printf("\n%*s", 2 * depth, "");
    putchar(bracket);
    is_first = false;
    if (!depth) putchar('\n');
}

void json_open_object(const char *key)
{
    open_value(key, '{');
}

void json_close_object(void)
{
    close_value('}');
}

void json_open_array(const char *key)
{
    open_value(key, '[');
}

void json_close_array(void)
{
    close_value(']');
}

void json_text(const char *key, const char *text)
{
    begin(key);
    if (text)
        print_string(text);
    else
        fputs("null", stdout);
}

void json_integer(const char *key, int64_t number)
{
    begin(key);
    printf("%lld", (long long)number);
}

void json_number(const char *key, double number)
{
    begin(key);
    if (isfinite(number))
        printf("%.9g", number);
    else
        fputs("null", stdout);
}

void json_bool(const char *key, bool value)
{
    begin(key);
    fputs(value ? "true" : "false", stdout);
}
